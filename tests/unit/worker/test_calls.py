"""What a rank computes a call with, as far as one process can tell."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.messages.requests import Forward, RunBlock
from comfy_xdit_patch.wire.slots import SlotMap, SlotTable
from comfy_xdit_patch.worker import calls as module
from comfy_xdit_patch.worker.calls import Calls
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.shard.blocks import DrivenBlocks


def test_patches_of_a_single_block_read_tensors_among_the_options(monkeypatch):
    table, slots = SlotTable(), SlotMap(torch.device("cpu"))
    sigmas = torch.tensor([1.0, 0.5])
    options = table.place("driven.options", {"values": {"sigmas": sigmas}, "missing": []})
    for slot, fd in table.take_created():
        slots.add(slot.number, fd, slot.size_bytes)
    read = []

    def run(self, block, arguments, *, patches, **_):
        read.append(patches.options(None)["sigmas"])
        return [], 0

    monkeypatch.setattr(DrivenBlocks, "run", run)
    resident = SimpleNamespace(
        begin=lambda *_, **__: 0,
        bytes_moved=0,
        scaled_in_place={},
        flux=SimpleNamespace(num_heads=4, get_submodule=lambda name: nullcontext()),
    )
    calls = Calls(
        groups=SimpleNamespace(device=torch.device("cpu"), rank=0),
        slots=slots,
        residents=SimpleNamespace(get=lambda model: resident),
    )
    tree = {"patches": {}, "skip": [], "attention": None, "options": options}
    message = RunBlock(
        request=1,
        model=1,
        block="double_blocks.0",
        grid=list(ParallelPlan(ulysses=2).grid),
        weights=[1, 1],
        counts=[2, 4, 0],
        arguments={},
        patches=json.loads(json.dumps(tree)),
        keep=[],
        is_first=True,
    )
    calls.run_block(message)
    assert torch.equal(read[0], sigmas)


class Event:
    """Is done when it is recorded, and was so 20 ms after the one before."""

    now_ms = 0.0

    def __init__(self, **_):
        self.at_ms = 0.0

    def record(self):
        self.at_ms = Event.now_ms = Event.now_ms + 20.0

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at_ms - self.at_ms


def forward(calls, slots, request):
    table = SlotTable()
    x = torch.rand(1, 4, 8, 8)
    tree, result = table.place("x", x), table.result_slot(x.nbytes)
    for slot, fd in table.take_created():
        slots.add(slot.number, fd, slot.size_bytes)
    grid = list(ParallelPlan().grid)
    return calls.forward(Forward(request, 1, grid, [], {"x": tree}, result.number))


@pytest.mark.parametrize(
    ("kind", "timed", "busy"),
    [("cpu", [7, 8, 9], [True, True, True]), ("cuda", [0, 7, 8], [False, True, True])],
)
def test_times_of_a_gpu_come_with_the_next_answer(monkeypatch, kind, timed, busy):
    slots = SlotMap(torch.device("cpu"))
    calls = calls_of(monkeypatch, slots, kind, lambda x: x)
    answers = []
    for request in (7, 8, 9):
        answers.append(forward(calls, slots, request))
        calls.read_times()  # as the worker does when it has answered
    assert [answer.request for answer in answers] == [7, 8, 9]
    assert [answer.timed for answer in answers] == timed
    assert [answer.busy_seconds > 0 for answer in answers] == busy


@pytest.mark.parametrize(
    ("share", "is_finite"),
    [
        (lambda x: x, True),
        (lambda x: x.masked_fill(x == x.max(), torch.nan), False),
        (lambda x: x.masked_fill(x == x.max(), -torch.inf), False),
        # The sum of these is more than half precision has a number for.
        (lambda x: torch.full_like(x, 60_000.0, dtype=torch.float16), True),
    ],
    ids=["finite", "a NaN", "an infinity", "a sum that overflows"],
)
def test_a_rank_says_whether_what_it_writes_is_finite(monkeypatch, share, is_finite):
    slots = SlotMap(torch.device("cpu"))
    calls = calls_of(monkeypatch, slots, "cpu", share)
    assert forward(calls, slots, 7).is_finite == is_finite


def calls_of(monkeypatch, slots, kind, share):
    """Calls of a model that is ``share``, of a latent."""
    monkeypatch.setattr(collectives, "Event", Event)
    monkeypatch.setattr(collectives, "clock", collectives.BusyClock())
    monkeypatch.setattr(
        module, "forward_share", lambda _, arguments, **__: (share(arguments["x"]), 0)
    )
    compiled = SimpleNamespace(num_compiled=0, num_graphs=0, reason="")
    resident = SimpleNamespace(
        begin=lambda *_, **__: 0,
        bytes_moved=0,
        scaled_in_place={},
        is_whole=True,
        blocks=None,
        later=None,
        compiled=SimpleNamespace(of=lambda *_: nullcontext(compiled)),
        enter=None,
        flux=None,
    )
    return Calls(
        groups=SimpleNamespace(device=torch.device(kind), rank=0),
        slots=slots,
        residents=SimpleNamespace(
            get=lambda model: resident, captured=SimpleNamespace(drop=lambda: None)
        ),
    )
