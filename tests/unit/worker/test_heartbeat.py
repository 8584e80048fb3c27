"""A worker beats while it is asked for something, whatever its computation does."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from comfy_xdit_patch.errors import DeadlineExceededError
from comfy_xdit_patch.wire.channel import Channel
from comfy_xdit_patch.wire.messages.replies import Alive
from comfy_xdit_patch.worker.process import BEAT_S, Heartbeat


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


def test_it_beats_with_the_count_during_a_request_and_is_still_after_it(ends):
    host, worker = ends
    count = iter(range(100))
    heartbeat = Heartbeat(worker, lambda: next(count))
    heartbeat.start()
    with heartbeat.during(7):  # a computation that hangs
        beats = [host.receive(deadline_s=30.0) for _ in range(3)]
    assert beats == [Alive(7, 0), Alive(7, 1), Alive(7, 2)]
    time.sleep(2 * BEAT_S)
    with contextlib.suppress(DeadlineExceededError):
        host.receive(deadline_s=0.0)  # the one that was under way
    with pytest.raises(DeadlineExceededError):
        host.receive(deadline_s=3 * BEAT_S)


def test_a_quick_request_costs_no_message(ends):
    host, worker = ends
    heartbeat = Heartbeat(worker, lambda: 0)
    heartbeat.start()
    for request in range(100):
        with heartbeat.during(request):
            pass
    with pytest.raises(DeadlineExceededError):
        host.receive(deadline_s=2 * BEAT_S)


def test_requests_that_follow_each_other_do_not_wake_the_heart_each_time(ends, monkeypatch):
    host, worker = ends
    heartbeat = Heartbeat(worker, lambda: 0)
    heartbeat.start()
    woken = []
    wake = heartbeat._is_awake.set
    monkeypatch.setattr(heartbeat._is_awake, "set", lambda: (woken.append(None), wake()))
    for request in range(100):
        with heartbeat.during(request):
            pass
    assert len(woken) == 1
    while heartbeat._is_awake.is_set():  # until nothing was asked for during a beat
        time.sleep(BEAT_S / 10)
    with heartbeat.during(100):
        assert host.receive(deadline_s=30.0) == Alive(100, 0)
    assert len(woken) == 2
