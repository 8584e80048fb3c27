"""A rank that hangs is told from one that is slow."""

from __future__ import annotations

import math

import pytest

from comfy_xdit_patch.host.pool.exchange import (
    MIN_PATIENCE_S,
    REMEMBERED_KINDS,
    SILENCE_S,
    SLACK,
    Hanging,
    StepTimes,
    Watch,
    kind_of,
)
from comfy_xdit_patch.wire.messages.requests import (
    Control,
    Decode,
    Fetch,
    Forward,
    RunBlock,
    Unload,
)

BEAT_S = 0.25


def follow(watch, *, until_s, counts, outstanding=(0, 1), start_s=0.0):
    """Beat for these ranks until something is found; ``counts`` gives a rank's at a time."""
    now = start_s
    while now <= until_s:
        for rank, count in counts.items():
            watch.heard(rank, count(now), now)
        found = watch.hanging(outstanding, now)
        if found is not None:
            return found, now
        now += BEAT_S
    return None, now


def test_a_rank_whose_heart_stops_is_named_after_the_silence():
    watch = Watch([0, 1], patience_s=600, now=0.0)
    found, now = follow(watch, until_s=60, counts={0: lambda t: t})
    assert found == Hanging(1, "was not heard of for 10 s")
    assert SILENCE_S < now <= SILENCE_S + 2 * BEAT_S


def test_ranks_that_beat_and_get_on_are_never_accused():
    watch = Watch([0, 1], patience_s=1, now=0.0)
    found, _ = follow(watch, until_s=500, counts={0: lambda t: t, 1: lambda t: t})
    assert found is None


def test_one_rank_that_gets_on_is_enough():
    watch = Watch([0, 1], patience_s=1, now=0.0)
    found, _ = follow(watch, until_s=500, counts={0: lambda t: t, 1: lambda _: 7})
    assert found is None


def test_of_ranks_that_are_stuck_the_one_behind_is_named():
    watch = Watch([0, 1, 2], patience_s=20, now=0.0)
    counts = {0: lambda _: 9, 1: lambda _: 8, 2: lambda _: 9}
    found, now = follow(watch, until_s=60, counts=counts, outstanding=(0, 1, 2))
    assert found == Hanging(1, "did not get on for 20 s")
    assert 20 < now <= 20 + 2 * BEAT_S


def test_ranks_that_have_issued_as_much_are_all_named():
    """GPU ranks: what they issued says nothing about which GPU stands still."""
    watch = Watch([0, 1, 2], patience_s=20, now=0.0)
    counts = {0: lambda _: 9, 1: lambda _: 8, 2: lambda _: 8}
    found, _ = follow(watch, until_s=60, counts=counts, outstanding=(0, 1, 2))
    assert found == Hanging(1, "did not get on for 20 s, nor did ranks 2")


def test_a_rank_that_has_answered_is_not_waited_for():
    watch = Watch([0, 1], patience_s=20, now=0.0)
    watch.heard(0, math.inf, 0.0)
    found, _ = follow(watch, until_s=60, counts={1: lambda _: 3}, outstanding=(1,))
    assert found == Hanging(1, "did not get on for 20 s")
    assert watch.hanging((), 1000.0) is None


def test_a_host_that_was_stopped_itself_accuses_nobody():
    watch = Watch([0, 1], patience_s=20, now=0.0)
    counts = {0: lambda _: 1, 1: lambda _: 1}
    found, now = follow(watch, until_s=5, counts=counts)
    assert found is None
    # Ctrl+Z for an hour: neither beats nor looks. Nothing is wrong when it goes on.
    found, _ = follow(watch, until_s=3605, counts={}, start_s=3600 + now - BEAT_S)
    assert found is None


def test_an_unmeasured_kind_has_the_whole_time_and_a_measured_one_ten_times_its_slowest():
    times = StepTimes(limit_s=600)
    assert times.patience_s("step") == 600
    times.add("step", 3.0)
    times.add("step", 1.0)
    assert times.patience_s("step") == SLACK * 3.0
    times.add("short", 0.01)
    assert times.patience_s("short") == MIN_PATIENCE_S
    times.add("long", 100.0)
    assert times.patience_s("long") == 600
    assert StepTimes(limit_s=5).patience_s("step") == 5


def test_a_request_that_is_no_kind_is_not_remembered():
    times = StepTimes(limit_s=600)
    times.add(None, 0.01)
    assert times.patience_s(None) == 600


def test_only_so_many_kinds_are_remembered():
    times = StepTimes(limit_s=600)
    for number in range(REMEMBERED_KINDS + 1):
        times.add(number, 1.0)
    assert times.patience_s(0) == 600
    assert times.patience_s(1) < 600


def forward(side=8, model=1, degree=2, ring=1, compiled=None):
    return Forward(
        request=5,
        model=model,
        grid=[1, 1, ring, degree, 1],
        weights=[],
        arguments={"x": {"$slot": [0, 9, "float32", [1, 16, side, side]]}, "list": [None, 1.5]},
        result=3,
        compiled=compiled,
    )


def test_a_step_whose_blocks_run_compiled_may_compile_them_again():
    compiled = {"backend": "inductor", "options": {}, "dynamic": None, "blocks": None}
    times = StepTimes(limit_s=600)
    times.add(kind_of(forward()), 0.1)
    assert times.patience_s(kind_of(forward())) == MIN_PATIENCE_S
    times.add(kind_of(forward(compiled=compiled)), 0.1)
    assert times.patience_s(kind_of(forward(compiled=compiled))) == 600


def test_the_kind_of_a_step_is_its_model_its_degrees_and_its_shapes():
    assert kind_of(forward()) == kind_of(forward())
    assert hash(kind_of(forward())) == hash(kind_of(forward()))
    kinds = {kind_of(forward(**change)) for change in ({}, {"side": 16}, {"model": 2})}
    assert len({*kinds, kind_of(forward(degree=4)), kind_of(forward(degree=1, ring=2))}) == 5


@pytest.mark.parametrize(
    "message",
    [
        Control(1, 2, 3, [1, 1, 1, 2, 1], [], {}),
        RunBlock(1, 2, "double_blocks.0", [1, 1, 1, 2, 1], [], [4, 8, 0], {}, None, [1], True),
        Decode(1, "ab", {}, {}, {}, {"$slot": [0, 9, "float32", [1, 16, 128, 128]]}, 3),
        Decode(1, "ab", {}, {}, {}, [{"$slot": [0, 9, "float32", [1, 16, 64, 64]]}], 3, [1]),
        Fetch(1, 2, [1, 1, 1, 2, 1], [], ["kept", 1], "image", [4, 8, 0], 0),
    ],
)
def test_other_computations_have_kinds_too(message):
    assert kind_of(message) is not None
    hash(kind_of(message))


def test_what_a_disk_decides_has_no_kind():
    assert kind_of(Unload(1)) is None
