"""What a rank computes a call with, as far as one process can tell."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.messages.requests import RunBlock
from comfy_xdit_patch.wire.slots import SlotMap, SlotTable
from comfy_xdit_patch.worker.calls import Calls
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
