"""Waits in exchanges are taken off, on CPU by the clock, on CUDA by pairs of events."""

from __future__ import annotations

import time

import pytest
import torch

from comfy_xdit_patch.worker.ranks import collectives as busy
from comfy_xdit_patch.worker.ranks.collectives import BusyClock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_waiting_is_not_being_busy():
    clock = BusyClock()
    clock.start(CPU)
    time.sleep(0.02)
    for _ in range(2):
        with clock.waiting():
            time.sleep(0.1)
    busy_s = clock.stop(is_copied_out=True)
    assert 0.02 <= busy_s < 0.15


def test_a_call_begins_with_no_waits_of_the_one_before():
    clock = BusyClock()
    clock.start(CPU)
    with clock.waiting():
        time.sleep(0.05)
    clock.start(CPU)
    time.sleep(0.02)
    assert clock.stop(is_copied_out=True) >= 0.02


class Stream:
    """A device that is at a time of its own, and events as torch's on it."""

    def __init__(self):
        self.now_ms = 0.0
        self.done_ms = 0.0
        self.events = self.asked = 0
        stream = self

        class Event:
            def __init__(self, *, enable_timing):
                assert enable_timing
                stream.events += 1

            def record(self):
                self.at_ms = stream.now_ms

            def query(self):
                return self.at_ms <= stream.done_ms

            def synchronize(self):
                stream.done_ms = max(stream.done_ms, self.at_ms)

            def elapsed_time(self, other):
                assert max(self.at_ms, other.at_ms) <= stream.done_ms, "not done yet"
                stream.asked += 1
                return other.at_ms - self.at_ms

        self.Event = Event


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(busy, "Event", stream.Event)
    return stream


def call(clock, stream, *, compute_ms, wait_ms, num_waits=3):
    clock.start(CUDA)
    for _ in range(num_waits):
        stream.now_ms += compute_ms
        with clock.waiting():
            stream.now_ms += wait_ms


def test_events_tell_how_long_the_stream_stood_still(stream):
    clock = BusyClock()
    call(clock, stream, compute_ms=5, wait_ms=70)
    assert clock.stop(is_copied_out=True) == pytest.approx(0.015)


def test_nothing_is_waited_for_where_nothing_is_copied_out(stream):
    clock = BusyClock()
    call(clock, stream, compute_ms=5, wait_ms=70)
    assert clock.stop(is_copied_out=False) == 0
    assert stream.done_ms == 0
    stream.done_ms = stream.now_ms
    call(clock, stream, compute_ms=7, wait_ms=70)
    assert clock.stop(is_copied_out=False) == pytest.approx(0.015), "of the call before"


def test_what_came_late_is_not_counted_for_another_kind_of_call(stream):
    clock = BusyClock()
    call(clock, stream, compute_ms=5, wait_ms=70)
    clock.stop(is_copied_out=False)
    call(clock, stream, compute_ms=7, wait_ms=70)
    assert clock.stop(is_copied_out=True) == pytest.approx(0.021)


def test_events_are_asked_when_the_host_has_its_answer(stream):
    clock = BusyClock()
    call(clock, stream, compute_ms=5, wait_ms=70)
    busy_s = clock.halt(is_copied_out=True)
    assert stream.done_ms == stream.now_ms, "the result is there"
    assert stream.asked == 0
    assert busy_s() == pytest.approx(0.015)


def test_events_are_used_again(stream):
    clock = BusyClock()
    for _ in range(50):
        call(clock, stream, compute_ms=1, wait_ms=1)
        clock.stop(is_copied_out=True)
    assert stream.events == 2 + 2 * 3


@pytest.mark.parametrize(("took_ms", "is_bound"), [(30, False), (10, True)])
def test_a_call_that_the_cpu_issues_slowly_is_told_from_one_that_the_gpu_computes(
    stream, monkeypatch, took_ms, is_bound
):
    """The CPU issues the call in 20 ms; what the copy out waits for the GPU does not count."""
    now = [0.0]
    monkeypatch.setattr(busy.time, "perf_counter", lambda: now[0])
    clock = BusyClock()
    clock.start(CUDA)
    now[0] += 0.020
    clock.launched()
    stream.now_ms += took_ms
    now[0] += 1.0
    clock.stop(is_copied_out=True)
    assert clock.is_launch_bound == is_bound
