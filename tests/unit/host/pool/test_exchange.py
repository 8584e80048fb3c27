"""Deaths that no channel reports, with real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from comfy_xdit_patch.errors import ExchangeError, WorkerError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool import exchange
from comfy_xdit_patch.host.pool import start as starting
from comfy_xdit_patch.host.pool.exchange import Exchange
from comfy_xdit_patch.host.pool.launcher import Worker
from comfy_xdit_patch.host.pool.start import _join_all
from comfy_xdit_patch.wire.channel import Channel, frame_of
from comfy_xdit_patch.wire.messages.replies import Failed, Joining, Raised, Unloaded
from comfy_xdit_patch.wire.messages.requests import Unload


@pytest.fixture
def worker(tmp_path):
    """A process in a worker's place, and its end of the channel, which somebody else holds too."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
    made = Worker(0, Device(name="cpu"), process, Channel(ours), tmp_path / "worker-0.log")
    yield made, theirs
    process.kill()
    process.wait()
    made.channel.close()
    theirs.close()


def request(*workers, meanwhile=None):
    exchange = Exchange(workers, step_timeout_s=60.0)
    exchange.send(Unload(exchange.next_number))
    (meanwhile or workers[0].process.kill)()
    return exchange.replies(lambda: None)


def test_a_death_is_noticed_at_once_though_somebody_holds_the_channel_open(worker):
    made, _ = worker
    start = time.monotonic()
    with pytest.raises(WorkerError, match="was killed by signal 9 during a request"):
        request(made)
    assert time.monotonic() - start < 1


def test_what_a_worker_said_before_its_death_is_still_heard(worker):
    made, theirs = worker
    theirs.sendall(frame_of(Failed(1, "forward", "CUDA out of memory", "")))
    with pytest.raises(WorkerError, match="CUDA out of memory"):
        request(made)


def test_a_death_in_the_start_is_noticed_though_somebody_holds_the_channel_open(worker):
    made, _ = worker
    os.kill(made.process.pid, 9)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="was killed by signal 9 during its start"):
        _join_all([made], time.monotonic() + 60, 60.0)
    assert time.monotonic() - start < 1


def test_a_rank_that_hangs_in_the_first_exchange_is_told_from_one_that_does_not_join(
    worker, monkeypatch
):
    made, theirs = worker
    monkeypatch.setattr(starting, "FIRST_EXCHANGE_S", 0.3)
    with pytest.raises(WorkerError, match="did not join within XDIT_START_TIMEOUT=1 s") as caught:
        _join_all([made], time.monotonic() + 0.5, 1.0)
    assert not isinstance(caught.value, ExchangeError)
    theirs.sendall(frame_of(Joining(0)))
    with pytest.raises(ExchangeError, match=r"Rank 0 .* did not exchange data within 0 s"):
        _join_all([made], time.monotonic() + 60, 60.0)


def test_half_of_the_time_left_is_kept_for_another_start(worker):
    made, theirs = worker
    theirs.sendall(frame_of(Joining(0)))
    start = time.monotonic()
    with pytest.raises(ExchangeError):
        _join_all([made], start + 2, 2.0, is_last=False)
    assert 0.9 < time.monotonic() - start < 1.9


@pytest.mark.parametrize("has_met", [False, True])
def test_a_failure_in_the_first_exchange_is_one_of_the_exchange(worker, has_met):
    made, theirs = worker
    if has_met:
        theirs.sendall(frame_of(Joining(0)))
    theirs.sendall(frame_of(Failed(0, "x", "RuntimeError: NCCL error", "")))
    with pytest.raises(WorkerError, match="NCCL error") as caught:
        _join_all([made], time.monotonic() + 60, 60.0)
    assert isinstance(caught.value, ExchangeError) == has_met


@pytest.mark.parametrize("has_met", [False, True])
def test_a_death_in_the_first_exchange_is_one_of_the_exchange(worker, has_met):
    made, theirs = worker
    if has_met:
        theirs.sendall(frame_of(Joining(0)))
    made.process.kill()
    when = "in the first exchange between ranks" if has_met else "during its start"
    with pytest.raises(WorkerError, match=f"was killed by signal 9 {when}") as caught:
        _join_all([made], time.monotonic() + 60, 60.0)
    assert isinstance(caught.value, ExchangeError) == has_met


@pytest.fixture
def two_workers(worker):
    """Two ranks, and what they say."""
    first, theirs = worker
    ours, others = socket.socketpair()
    second = Worker(1, first.device, first.process, Channel(ours), first.log_path)
    yield (first, second), (theirs, others)
    second.channel.close()
    others.close()


def raised(error="ValueError", num_exchanges=3):
    return Raised(1, error, "5 dimensions", num_exchanges)


def test_what_all_ranks_raise_is_an_answer(two_workers):
    workers, ends = two_workers
    for end in ends:
        end.sendall(frame_of(raised()))
    assert request(*workers, meanwhile=lambda: None) == [raised(), raised()]


@pytest.mark.parametrize(
    "other", [raised(error="KeyError"), raised(num_exchanges=4), Unloaded(1), None]
)
def test_what_one_rank_raises_loses_all(two_workers, monkeypatch, other):
    monkeypatch.setattr(exchange, "RAISED_GRACE_S", 0.1)
    workers, ends = two_workers
    ends[0].sendall(frame_of(raised()))
    if other is not None:
        ends[1].sendall(frame_of(other))
    with pytest.raises(WorkerError, match=r"^Rank 0 raised .*same: ValueError: 5 dimensions$"):
        request(*workers, meanwhile=lambda: None)
