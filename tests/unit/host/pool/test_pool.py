"""Which crew is the one of now, and what becomes of the one before. No process is started."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool import pool as module
from comfy_xdit_patch.host.pool.exchange import Exchange
from comfy_xdit_patch.host.pool.inheritance import HostState
from comfy_xdit_patch.host.pool.pool import Pool, PoolState
from comfy_xdit_patch.host.pool.start import Started
from comfy_xdit_patch.settings import read_settings

SETTINGS = read_settings({"XDIT_GPUS": "cpu:1", "XDIT_START_TIMEOUT": "1"})


def nothing():
    """As a poll."""


class Process:
    def poll(self):
        return None


class Worker:
    rank = 0
    device = Device("cpu")
    process = Process()
    channel = None


@pytest.fixture
def pool(monkeypatch):
    """A pool without a keeper; ``start_all`` brings a crew, ``ended`` are workers that were."""
    made = Pool(
        devices=[Worker.device],
        host_state=HostState("/", [], [], False, {}),
        settings=SETTINGS,
        unless_busy=lambda action: made.is_busy or action(),
    )
    made.ended, made.is_busy = [], False
    monkeypatch.setattr(made, "get_ready", lambda: None)
    monkeypatch.setattr(module, "AFTER_LOSS_S", (0.0,))
    monkeypatch.setattr(made._starter, "start", lambda: Started((Worker(),), {}, 0.5))
    monkeypatch.setattr(module, "end_workers", lambda workers, grace_s: made.ended.append(workers))
    monkeypatch.setattr(module, "dismiss_workers", lambda workers: made.ended.append(workers))
    return made


def start_all(pool):
    pool.start()
    assert pool.state is PoolState.STARTING
    pool._keep_once()
    return pool.wait_until_ready(nothing)


def test_a_lost_crew_is_ended_once_and_the_next_one_is_another(pool):
    first = start_all(pool)
    assert pool.crew is first
    with pytest.raises(WorkerError, match=r"^Rank 0 hangs$"), first.turn(nothing):
        raise WorkerError("Rank 0 hangs")
    assert (pool.crew, pool.state, pool.error) == (None, PoolState.BROKEN, "Rank 0 hangs")
    second = start_all(pool)
    assert second is not first
    with pytest.raises(WorkerError, match=r"^Rank 0 hangs$"), first.turn(nothing):
        raise AssertionError("a turn with ranks that are lost")
    pool._lose(first, "heard of once more")
    assert (pool.crew, pool.error, second.lost) == (second, None, None)
    assert pool.ended == [first.workers]


def test_dismissed_ranks_answer_nobody(pool):
    crew = start_all(pool)
    pool.stop()
    with pytest.raises(WorkerError, match=r"^The workers are not running\.$"):
        crew.turn(nothing).__enter__()
    assert (pool.crew, pool.state, pool.ended) == (None, PoolState.IDLE, [crew.workers])


def test_workers_that_come_when_nobody_wants_them_any_more_are_dismissed(pool, monkeypatch):
    started = Started((Worker(),), {}, 0.5)

    def start():
        pool.stop()
        return started

    monkeypatch.setattr(pool._starter, "start", start)
    pool.start()
    pool._keep_once()
    assert (pool.crew, pool.ended) == (None, [started.workers])


def settings_with(**variables):
    return read_settings({"XDIT_GPUS": "cpu:1", "XDIT_START_TIMEOUT": "1", **variables})


@pytest.mark.parametrize(
    "variables",
    [
        {"XDIT_STRATEGY": "ring"},
        {"XDIT_BALANCE": "even"},
        {"XDIT_GPU_MEMORY": "8"},
        {"XDIT_IDLE_TIMEOUT": "9"},
    ],
)
def test_ranks_that_would_be_started_the_same_go_on_under_other_settings(pool, variables):
    crew = start_all(pool)
    assert pool.change([Worker.device], settings_with(**variables))
    assert (pool.crew, pool.state, pool.ended) == (crew, PoolState.READY, [])


@pytest.mark.parametrize(
    ("devices", "variables"),
    [
        ([Device("cpu")] * 2, {}),
        ([Device("cpu")], {"XDIT_CPU_THREADS": "2"}),
        ([Device("cpu")], {"XDIT_STEP_TIMEOUT": "5"}),
        ([Device("cpu")], {"XDIT_STRICT": "1"}),
    ],
)
def test_others_are_started_at_once_in_the_place_of_those_that_end(pool, devices, variables):
    crew = start_all(pool)
    assert not pool.change(devices, settings_with(**variables))
    assert (pool.crew, pool.state, pool.ended) == (None, PoolState.STARTING, [crew.workers])
    assert pool.world_size == len(devices)


def test_no_ranks_start_before_they_are_wanted(pool):
    assert not pool.change([Worker.device] * 2, SETTINGS)
    assert pool.state is PoolState.IDLE


def test_switched_off_no_ranks_start_and_the_nursery_ends_and_on_again_they_return(
    pool, monkeypatch
):
    closed = []
    monkeypatch.setattr(pool._starter, "close", lambda: closed.append(True))
    start_all(pool)
    assert not pool.change([Worker.device], settings_with(XDIT_STRATEGY="off"))
    pool.start()
    assert (pool.crew, pool.state, closed) == (None, PoolState.IDLE, [])
    pool._keep_once()
    assert closed == [True]
    assert not pool.change([Worker.device], SETTINGS)
    assert pool.state is PoolState.STARTING


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, which a test puts forward; a wait takes no time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "WATCH_S", 0.0)

    def forward(seconds):
        now[0] += seconds

    return forward


def idle_after(pool, seconds, **variables):
    """Have the timeout, and count how often the nursery ends."""
    pool.change(pool.devices, settings_with(XDIT_IDLE_TIMEOUT=seconds, **variables))
    closed = []
    pool._starter.close = lambda: closed.append(True)
    return closed


def lives_on(pool):
    pool._keep_once()
    return pool.crew is not None


@pytest.mark.parametrize(("start", "num_closed"), [("early", 0), ("first", 1)])
def test_ranks_that_nobody_used_for_the_timeout_end_and_do_not_return_by_themselves(
    pool, clock, start, num_closed
):
    closed = idle_after(pool, "60", XDIT_START=start)
    crew = start_all(pool)
    clock(59)
    assert lives_on(pool)
    clock(1)
    assert not lives_on(pool)
    assert (pool.state, pool.error, pool.ended) == (PoolState.IDLE, None, [crew.workers])
    assert len(closed) == num_closed
    clock(600)
    assert not lives_on(pool)
    assert pool.state is PoolState.IDLE
    assert start_all(pool) is not crew
    assert pool.num_restarts == 0, "that made up for no loss"


def test_every_use_of_the_ranks_begins_the_timeout_anew(pool, clock, monkeypatch):
    monkeypatch.setattr(Exchange, "settle", lambda *_: None)
    idle_after(pool, "60")
    crew = start_all(pool)
    clock(59)
    with crew.turn(nothing):
        clock(600)
    assert lives_on(pool)
    clock(59)
    pool.used()
    clock(59)
    assert lives_on(pool)
    clock(1)
    assert not lives_on(pool)


def test_ranks_do_not_end_while_something_runs_or_without_a_timeout(pool, clock):
    start_all(pool)
    clock(1e9)
    assert lives_on(pool), "the default"
    idle_after(pool, "60")
    pool.is_busy = True
    assert lives_on(pool)
    pool.used()
    pool.is_busy = False
    assert lives_on(pool)
    clock(60)
    assert not lives_on(pool)


def test_ranks_that_are_used_in_the_moment_in_which_the_timeout_is_over_live_on(pool, clock):
    idle_after(pool, "60")
    start_all(pool)
    clock(60)

    def wait_for_a_prompt(action):
        pool.used()
        action()

    pool._unless_busy = wait_for_a_prompt
    assert lives_on(pool)


@pytest.mark.parametrize("fails", [False, True])
def test_workers_that_come_after_others_were_asked_for_are_dismissed(pool, monkeypatch, fails):
    """As if nothing had been started: the others are started then."""
    old, new = Started((Worker(),), {}, 0.5), Started((Worker(), Worker()), {}, 0.5)

    def start():
        pool.change([Worker.device] * 2, SETTINGS)
        monkeypatch.setattr(pool._starter, "start", lambda: new)
        if fails:
            raise WorkerError("the old ones")
        return old

    monkeypatch.setattr(pool._starter, "start", start)
    pool.start()
    pool._keep_once()
    assert (pool.crew, pool.state, pool.error) == (None, PoolState.STARTING, None)
    assert pool.ended == ([] if fails else [old.workers])
    pool._keep_once()
    assert pool.wait_until_ready(nothing).workers is new.workers


def test_a_fault_in_the_keepers_thread_leaves_no_crew_behind(pool, monkeypatch):
    class EndOfTestError(BaseException):
        pass

    crew = start_all(pool)
    faults = iter([ValueError("ours"), EndOfTestError()])

    def fail():
        raise next(faults)

    monkeypatch.setattr(pool, "_keep_once", fail)
    monkeypatch.setattr(pool._starter, "get_ready", lambda: None)
    with pytest.raises(EndOfTestError):
        pool._keep()
    assert crew.lost == pool.error == "ValueError: ours"
    assert (pool.crew, pool.state, pool.ended) == (None, PoolState.BROKEN, [crew.workers])
