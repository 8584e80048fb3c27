"""Two ranks on emulated cards: both replay, both capture, or neither does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rig.server import EMULATED

BEGIN = """
import emulated_cuda, gc, json, sys, torch
import torch.distributed as dist
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.shard.captured_forwards import NUM_KEPT, CapturedForwards

rank, card = int(sys.argv[2]), torch.device("cuda:0")
dist.init_process_group("nccl", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
forwards, found, where = CapturedForwards(card), [], [(7,)]
weight, cached = torch.full((2,), 10.0).to(card), {}

def index():
    if "index" not in cached:
        cached["index"] = torch.arange(1, -1, -1, device=card)
    return cached["index"]

def share(given):
    out = given["x"].index_select(0, index()) * weight
    collectives.all_reduce_sum(out, group=dist.group.WORLD)
    return out, 8

def call(value=1.0, model=1, how=()):
    with torch.no_grad():
        collectives.clock.start(card)
        begun = collectives.num_begun()
        given = {"x": torch.tensor([value, 2 * value]).to(card), "options": {"scale": 2}}
        outcome = forwards.compute(share, given, model=model, how=how, places=lambda: where[0])
        rows, begun = outcome.rows.tolist(), collectives.num_begun() - begun
        busy = collectives.clock.stop(is_copied_out=True)
    assert rows == [40 * value, 20 * value], rows
    assert outcome.bytes_sent == 8 and busy > 0 and not collectives.is_in_one()
    how = "replayed" if outcome.is_replayed else "captured" if outcome.has_captured else "eager"
    found.append([how, begun, outcome.reason])
"""
END = "\nprint(json.dumps(found))\n"


def on_two_ranks(path: Path, body: str) -> list[list[list[object]]]:
    env = {**os.environ, "PYTHONPATH": str(EMULATED), "EMULATED_CARDS": "4090,4090"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + body + END, str(path / "store"), str(rank)],
            env={**env, "CUDA_VISIBLE_DEVICES": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(*rank.communicate(timeout=120), rank.returncode) for rank in ranks]
    for _, errors, code in ended:
        assert code == 0, errors
    return [json.loads(out) for out, _, _ in ended]


# How a call went, and how many exchanges were begun for it: one is its own. The ranks agree by one
# before a kind's first call, and by two after a capture, which makes its own once, and again in the
# replay that is compared.
FIRST, SEEN_AGAIN = ["eager", 2, ""], ["eager", 1, ""]
CAPTURED, REPLAYED = ["captured", 5, ""], ["replayed", 1, ""]
AGREED = 1


def agreed(row: list[object]) -> list[object]:
    how, begun, reason = row
    assert isinstance(begun, int)
    return [how, begun + AGREED, reason]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            "for value in (1.0, 2.0, 3.0, 4.0): call(value)",
            [FIRST, CAPTURED, REPLAYED, REPLAYED],
            id="the third call is a replay",
        ),
        pytest.param(
            "for value in (1.0, 2.0, 3.0): call(value)\n"
            "forwards.look_again(); call(4.0); call(5.0)",
            [FIRST, CAPTURED, REPLAYED, agreed(REPLAYED), REPLAYED],
            id="the ranks look again and have all they had",
        ),
        pytest.param(
            "for value in (1.0, 2.0, 3.0): call(value)\n"
            "rank and forwards.drop(); forwards.look_again()\n"
            "for value in (4.0, 5.0, 6.0): call(value)",
            [FIRST, CAPTURED, REPLAYED, FIRST, CAPTURED, REPLAYED],
            id="one rank gave its memory away",
        ),
        pytest.param(
            "for value in (1.0, 2.0, 3.0): call(value)\n"
            "if rank: where[0] = (8,)\n"
            "forwards.look_again(); call(4.0); call(5.0)",
            [FIRST, CAPTURED, REPLAYED, agreed(CAPTURED), REPLAYED],
            id="weights lie elsewhere on one rank",
        ),
        pytest.param(
            "for value in (1.0, 2.0): call(value)\n"
            "for how in range(NUM_KEPT): call(how=how)\n"
            "call()",
            [FIRST, CAPTURED, *[FIRST] * 8, FIRST],
            id="the kind used longest ago goes",
        ),
        pytest.param(
            "for value in (1.0, 2.0): call(value)\n"
            "cached.clear(); gc.collect(); other = torch.zeros(64, dtype=torch.int64).to(card)\n"
            "call(3.0)",
            [FIRST, CAPTURED, REPLAYED],
            id="what a graph reads is kept",
        ),
    ],
)
def test_all_ranks_go_the_same_way(tmp_path: Path, body: str, expected: list[list[object]]) -> None:
    assert on_two_ranks(tmp_path, body) == [expected, expected]


OTHERWISE = """
plain = share
def share(given):
    is_captured = rank and torch.cuda.is_current_stream_capturing()
    {before}
    rows, num_bytes = plain(given)
    return rows + 1 if {is_other} else rows, num_bytes
"""
ASKS = OTHERWISE.format(before="is_captured and given['x'].tolist()", is_other="False")
DIFFERS = OTHERWISE.format(before="", is_other="is_captured")


NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
LIES_ELSEWHERE = "not all weights lie on the card"
FAILED = f"torch did not capture the forward: RuntimeError: {NOT_PERMITTED}"
OTHER_BITS = "a replay of the captured forward gives other bits"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("if rank: where[0] = None", [(2, LIES_ELSEWHERE), (1, LIES_ELSEWHERE)]),
        (ASKS, [(2, ""), (2, FAILED), (1, FAILED)]),
        (DIFFERS, [(2, ""), (5, OTHER_BITS), (1, OTHER_BITS)]),
    ],
    ids=["weights elsewhere", "a capture that fails", "other bits"],
)
def test_nobody_replays_where_one_rank_cannot(
    tmp_path: Path, body: str, expected: list[tuple[int, str]]
) -> None:
    others, its_own = on_two_ranks(tmp_path, f"{body}\nfor _ in {expected}: call()")
    assert its_own == [["eager", *row] for row in expected]
    assert [[how, reason] for how, _, reason in others] == [["eager", ""] for _ in expected]
