"""A rank that has no room for a call says so, and all ranks leave the call before they begin it."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.wire.messages.replies import NoRoom
from comfy_xdit_patch.wire.messages.requests import Control, Forward, RunBlock
from comfy_xdit_patch.worker import room
from comfy_xdit_patch.worker.room import has_room, no_room_for

CPU = torch.device("cpu")
NEEDED = 100


def nothing():
    """Have nothing that torch does not know of."""


@pytest.fixture
def card(monkeypatch):
    """``card(free, kept)``: bytes that are free, and those that torch keeps and can give back."""

    def pretend(free, kept=0):
        left = [free]

        def empty(size, **_):
            if size > left[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def empty_cache():
            left[0] += kept

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)

    return pretend


@pytest.mark.parametrize(
    ("free", "kept", "is_enough"), [(100, 0, True), (60, 40, True), (99, 0, False), (60, 39, False)]
)
def test_what_torch_keeps_for_later_is_room(card, free, kept, is_enough):
    card(free, kept)
    assert has_room(CPU, NEEDED, nothing) == is_enough


def test_graphs_give_their_memory_back_where_that_is_too_little(card):
    dropped = []
    for free in (NEEDED, NEEDED - 1):
        card(free, 1)
        assert has_room(CPU, NEEDED, lambda: dropped.append("graphs"))
    assert dropped == ["graphs"]


def forward(working_bytes):
    return Forward(9, 1, [1, 1, 2, 1, 1], [], {}, 0, None, working_bytes)


@pytest.mark.parametrize("free", [NEEDED, NEEDED - 1])
@pytest.mark.parametrize("is_other_short", [False, True])
def test_all_ranks_leave_a_call_for_which_one_has_no_room(card, monkeypatch, free, is_other_short):
    card(free)
    monkeypatch.setattr(
        room.collectives, "all_reduce_max", lambda flag: flag.clamp_(min=float(is_other_short))
    )
    is_short = free < NEEDED
    expected = NoRoom(9, is_short) if is_short or is_other_short else None
    assert no_room_for(forward(NEEDED), CPU, nothing) == expected


@pytest.mark.parametrize(
    "call",
    [
        Control(9, 1, 1, [1, 1, 2, 1, 1], [], {}, NEEDED),
        RunBlock(9, 1, "b", [1, 1, 2, 1, 1], [], [1, 1, 0], {}, None, [1], True, NEEDED),
    ],
)
def test_controlnets_and_the_first_block_of_a_step_look_too(card, monkeypatch, call):
    card(NEEDED - 1)
    monkeypatch.setattr(room.collectives, "all_reduce_max", lambda flag: flag)
    assert no_room_for(call, CPU, nothing) == NoRoom(9, True)


def test_nothing_is_exchanged_for_a_call_like_one_before(monkeypatch):
    monkeypatch.setattr(room.collectives, "all_reduce_max", None)
    assert no_room_for(forward(0), CPU, nothing) is None
