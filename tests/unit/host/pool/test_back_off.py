"""Workers that are lost again and again are started less and less often."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.host.pool import pool as back_off
from comfy_xdit_patch.host.pool.pool import AFTER_LOSS_S, AFTER_START_S, BackOff


@pytest.fixture
def clock(monkeypatch):
    times = [1000.0]
    monkeypatch.setattr(back_off.time, "monotonic", lambda: times[0])
    return times


def wait_s(waits, clock):
    """Return how long it takes until a try is allowed."""
    start = clock[0]
    while not waits.is_over:
        clock[0] += 0.5
    return clock[0] - start


@pytest.mark.parametrize("waits_s", [AFTER_LOSS_S, AFTER_START_S])
def test_every_failure_has_a_longer_wait_and_the_last_repeats(clock, waits_s):
    waits = BackOff()
    assert waits.is_over
    found = []
    for _ in (*waits_s, None):
        waits.failed(waits_s)
        found.append(wait_s(waits, clock))
    assert found == [*waits_s, waits_s[-1]]


def test_after_a_run_that_went_well_the_first_wait_comes_again(clock):
    waits = BackOff()
    for _ in range(3):
        waits.failed(AFTER_LOSS_S)
        wait_s(waits, clock)
    waits.succeeded()
    waits.failed(AFTER_LOSS_S)
    assert wait_s(waits, clock) == AFTER_LOSS_S[0]
