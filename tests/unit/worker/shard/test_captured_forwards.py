"""Two ranks on emulated cards: both replay, both capture, or neither does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rig.server import EMULATED

DEADLINE_S = 180.0

PROGRAM = """
import emulated_cuda, gc, json, sys, torch, weakref
import torch.distributed as dist
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.shard.captured_forwards import NUM_KEPT, CapturedForwards

rank, card = int(sys.argv[2]), torch.device("cuda:0")
dist.init_process_group("nccl", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
weight, cached = torch.full((2,), 10.0).to(card), {}

def index():
    if "index" not in cached:
        cached["index"] = torch.arange(1, -1, -1, device=card)
    return cached["index"]

def share(given):
    is_captured = rank and torch.cuda.is_current_stream_capturing()
    if is_captured and is_asking:
        given["x"].tolist()
    out = given["x"].index_select(0, index()) * weight
    collectives.all_reduce_max(out)  # which the clock is told of
    return out + 1 if is_captured and is_other else out, 8

def call(value=1.0, model=1, how=()):
    with torch.no_grad():
        collectives.clock.start(card)
        begun = collectives.num_begun()
        given = {"x": torch.tensor([value, 2 * value]).to(card), "options": {"scale": 2}}
        outcome = forwards.compute(share, given, model=model, how=how, places=lambda: where[0])
        rows, begun = outcome.rows.tolist(), collectives.num_begun() - begun
        busy = collectives.clock.stop(is_copied_out=True)
    assert rows == [20 * value, 10 * value], rows
    assert outcome.bytes_sent == 8 and busy > 0 and not collectives.is_in_one()
    how = "replayed" if outcome.is_replayed else "captured" if outcome.has_captured else "eager"
    found[-1].append([how, begun, outcome.reason])

found = []
for body in json.loads(sys.argv[3]):
    forwards, where, is_asking, is_other = CapturedForwards(card), [(7,)], False, False
    found.append([])
    exec(body)
print(json.dumps(found))
"""

# How a call went, and how many exchanges were begun for it: one is its own. The ranks agree by one
# before a kind's first call, and by two after a capture, which makes its own once, and again in the
# replay that is compared.
FIRST, CAPTURED, REPLAYED = ["eager", 2, ""], ["captured", 5, ""], ["replayed", 1, ""]
AGREED = 1


def agreed(row: list[object]) -> list[object]:
    how, begun, reason = row
    assert isinstance(begun, int)
    return [how, begun + AGREED, reason]


ALL_THE_SAME = {
    "the third call is a replay": (
        "for value in (1.0, 2.0, 3.0, 4.0): call(value)",
        [FIRST, CAPTURED, REPLAYED, REPLAYED],
    ),
    "the ranks look again and have all they had": (
        "for value in (1.0, 2.0, 3.0): call(value)\nforwards.look_again(); call(4.0); call(5.0)",
        [FIRST, CAPTURED, REPLAYED, agreed(REPLAYED), REPLAYED],
    ),
    "one rank gave its memory away": (
        "for value in (1.0, 2.0, 3.0): call(value)\n"
        "rank and forwards.drop(); forwards.look_again()\n"
        "for value in (4.0, 5.0, 6.0): call(value)",
        [FIRST, CAPTURED, REPLAYED, FIRST, CAPTURED, REPLAYED],
    ),
    "weights lie elsewhere on one rank": (
        "for value in (1.0, 2.0, 3.0): call(value)\n"
        "if rank: where[0] = (8,)\n"
        "forwards.look_again(); call(4.0); call(5.0)",
        [FIRST, CAPTURED, REPLAYED, agreed(CAPTURED), REPLAYED],
    ),
    "the kind used longest ago goes": (
        "for value in (1.0, 2.0): call(value)\nfor how in range(NUM_KEPT): call(how=how)\ncall()",
        [FIRST, CAPTURED, *[FIRST] * 8, FIRST],
    ),
    "what a graph reads is kept": (
        "for value in (1.0, 2.0): call(value)\n"
        "read = weakref.ref(index()); cached.clear(); gc.collect(); call(3.0)\n"
        "assert read() is not None; forwards.drop(); gc.collect(); assert read() is None",
        [FIRST, CAPTURED, REPLAYED],
    ),
}
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
ELSEWHERE = "not all weights lie on the card"
FAILED = f"torch did not capture the forward: RuntimeError: {NOT_PERMITTED}"
OTHER_BITS = "a replay of the captured forward gives other bits"
# What is the matter with rank 1, how many exchanges it begins, and what it says.
ONE_CANNOT = {
    "weights elsewhere": ("if rank: where[0] = None", [(2, ELSEWHERE), *[(1, ELSEWHERE)] * 2]),
    "a capture that fails": ("is_asking = True", [(2, ""), (2, FAILED), (1, FAILED)]),
    "other bits": ("is_other = True", [(2, ""), (5, OTHER_BITS), (1, OTHER_BITS)]),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What became of the calls of each case, on both ranks, which run all cases one by one."""
    store: Path = tmp_path_factory.mktemp("captured") / "store"
    bodies = [body for body, _ in ALL_THE_SAME.values()]
    bodies += [f"{body}\nfor _ in range(3): call()" for body, _ in ONE_CANNOT.values()]
    env = {**os.environ, "PYTHONPATH": str(EMULATED), "EMULATED_CARDS": "4090,4090"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(store), str(rank), json.dumps(bodies)],
            env={**env, "CUDA_VISIBLE_DEVICES": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(*rank.communicate(timeout=DEADLINE_S), rank.returncode) for rank in ranks]
    for _, errors, code in ended:
        assert code == 0, errors
    of_cases = zip(*(json.loads(out) for out, _, _ in ended), strict=True)
    return dict(zip((*ALL_THE_SAME, *ONE_CANNOT), of_cases, strict=True))


@pytest.mark.parametrize("name", ALL_THE_SAME)
def test_all_ranks_go_the_same_way(found: dict[str, list[Any]], name: str) -> None:
    assert list(found[name]) == [ALL_THE_SAME[name][1]] * 2


@pytest.mark.parametrize("name", ONE_CANNOT)
def test_nobody_replays_where_one_rank_cannot(found: dict[str, list[Any]], name: str) -> None:
    others, its_own = found[name]
    assert its_own == [["eager", *row] for row in ONE_CANNOT[name][1]]
    assert [[how, reason] for how, _, reason in others] == [["eager", ""]] * 3
