"""Many kills, cancels and hard ends at random moments, and a long run with all of them.

The default run takes a few of each. ``ENDURANCE_KILLS``, ``ENDURANCE_CANCELS``,
``ENDURANCE_HOST_KILLS`` and ``ENDURANCE_PROMPTS`` say how many; ``ENDURANCE_SEED`` seeds chance.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import graphs
from rig.breadth import how_many
from rig.checkpoints import Sizes, models_directory
from rig.environment import RigError
from rig.fault_bench import DEADLINE_S, STEPS, Bench
from rig.faults import (
    EVERYWHERE,
    IN_A_STEP,
    Fault,
    Orders,
    descendants,
    is_running,
    num_fds,
    num_threads,
)
from rig.memory import own_memory
from rig.server import Server, base_directory
from rig.trees import Tree

pytestmark = pytest.mark.newest_only

Record = Callable[[str, object], None]

LONG = 40
"""Steps of a prompt that is to be disturbed."""
GROWTH = 1.05
MAX_DEAF = 3


def times(name: str, default: int, *, whole: int | None = None) -> int:
    return how_many(default, whole=whole or default, variable=f"ENDURANCE_{name}")


@pytest.fixture
def chance() -> random.Random:
    return random.Random(times("SEED", 1))


def spread(seconds: list[float]) -> str:
    """Median, 95th percentile and largest, in ms."""
    ordered = sorted(1000 * s for s in seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return (
        f"n {len(ordered)}, median {statistics.median(ordered):.0f} ms, p95 {p95:.0f} ms, "
        f"max {ordered[-1]:.0f} ms"
    )


@pytest.mark.thorough  # test_faults.py kills one in a step that it knows, within the same second.
def test_a_killed_worker_costs_less_than_a_second(
    bench: Bench, chance: random.Random, record_property: Record
) -> None:
    decided, finished = [], []
    num_deaf = 0
    while len(decided) < times("KILLS", 1):
        bench.heal()
        expected, graph = bench.image_of(steps=LONG)
        prompt = bench.ranks.post_prompt(graph)
        steps_before = chance.randrange(1, LONG - 5)
        try:
            bench.ranks.wait_for_steps(prompt, steps_before, DEADLINE_S)
        except RigError:  # Once in dozens of runs nothing comes through the websocket.
            num_deaf += 1
            assert num_deaf <= MAX_DEAF
            bench.compare(expected, bench.ranks.wait(prompt, DEADLINE_S))  # All else was well.
            bench.ranks.listen()
            continue
        time.sleep(chance.random() * 0.1)
        done, start, start_unix = bench.ranks.num_steps_done(prompt), time.monotonic(), time.time()
        os.kill(chance.choice(sorted(bench.pids)), signal.SIGKILL)
        bench.ranks.wait_for_steps(prompt, done + 1, DEADLINE_S)
        finished.append(time.monotonic() - start)
        bench.compare(expected, bench.ranks.wait(prompt, DEADLINE_S))
        status = bench.ranks.status()
        assert status["last_run"]["steps"] == LONG
        assert 0 < status["last_run"]["steps_fell_back"] < LONG
        decided.append(status["last_loss_unix_s"] - start_unix)
    record_property("runs without progress messages", num_deaf)
    record_property("from a death to the decision to run the step here", spread(decided))
    record_property("from a death to the next finished step", spread(finished))
    assert max(decided) < 1.0
    bench.heal()


def test_cancels_at_any_moment_strand_nobody(
    bench: Bench, chance: random.Random, record_property: Record
) -> None:
    bench.heal()
    pids = bench.pids
    seconds, outcomes = [], Counter[str]()
    for _ in range(times("CANCELS", 3, whole=10)):
        _, graph = bench.graph_of(steps=LONG)
        prompt = bench.ranks.post_prompt(graph)
        time.sleep(chance.random() * 2.0)
        start = time.monotonic()
        bench.ranks.interrupt()
        try:
            bench.ranks.wait(prompt, DEADLINE_S)
            outcomes["finished before"] += 1
        except InterruptedError:
            outcomes["cancelled"] += 1
            seconds.append(time.monotonic() - start)
        assert not bench.ranks.queued(), "a prompt is left"
    record_property("cancels", dict(outcomes))
    record_property("from a cancel to the end of the prompt", spread(seconds))
    assert outcomes["cancelled"]
    bench.heal()
    assert bench.pids == pids, "no worker was lost by it"


def test_nothing_outlives_a_host_that_is_killed(
    tree: Tree,
    tmp_path: Path,
    chance: random.Random,
    record_property: Record,
) -> None:
    models = models_directory(Sizes(hidden=512))
    moments = []
    for number in range(times("HOST_KILLS", 1)):
        shared = set(os.listdir("/dev/shm"))
        with base_directory(tmp_path / str(number), models) as base:
            server = Server(tree, base, env={"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": "400"})
            with server:
                assert server.process is not None
                server.post_prompt(graph_to_kill())
                moment = chance.random() * 20.0  # its workers start, join, load, compute
                time.sleep(moment)
                workers = [p for p in descendants(server.process.pid) if is_running(p)]
                os.kill(server.process.pid, signal.SIGKILL)
                end = time.monotonic() + 2.0
                while any(is_running(pid) for pid in workers):
                    assert time.monotonic() < end, f"workers live on, killed after {moment:.1f} s"
                    time.sleep(0.01)
                assert set(os.listdir("/dev/shm")) <= shared
                moments.append(f"{moment:.1f} s, {len(workers)} workers")
    record_property("moments", moments)


def graph_to_kill() -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=1, size=(128, 128), steps=500)


def test_a_long_run_with_faults_cancels_and_sizes_leaves_no_trace(
    bench: Bench, orders: Orders, chance: random.Random, record_property: Record
) -> None:
    bench.heal()
    host = bench.host_pid
    events: Counter[str] = Counter()
    trace: list[dict[str, int]] = []

    def events_in_turn() -> Iterator[str]:
        while True:
            kinds = ["plain"] * 6 + ["cancel"] * 2 + ["fault"] + ["free"]
            chance.shuffle(kinds)
            yield from kinds

    num_prompts = times("PROMPTS", 20)
    for number, event in zip(range(num_prompts), events_in_turn(), strict=False):
        events[event] += 1
        if event == "free":
            bench.ranks.free_and_wait()
        if event == "cancel":
            _, graph = bench.graph_of(steps=LONG)
            prompt = bench.ranks.post_prompt(graph)
            time.sleep(chance.random())
            bench.ranks.interrupt()
            with contextlib.suppress(InterruptedError):
                bench.ranks.wait(prompt, DEADLINE_S)
        elif event == "fault":
            kind = chance.choice([k for k in EVERYWHERE if k != "stop"])
            orders.give(Fault(chance.choice(IN_A_STEP), kind, chance.randrange(2)))
            bench.run(size=chance.choice(SIZES))
        else:
            bench.run(size=chance.choice(SIZES))
        if number % 10 == 9:
            bench.heal()
            bench.ranks.free_and_wait()
            trace.append(
                {
                    "memory of the host": own_memory(host),
                    "file descriptors": num_fds(host),
                    "threads": num_threads(host),
                    "processes": len(descendants(host)),
                    "/dev/shm": len(os.listdir("/dev/shm")),
                    **{
                        f"memory of rank {rank}": own_memory(pid)
                        for rank, pid in enumerate(sorted(bench.pids))
                    },
                }
            )
    record_property("events", dict(events))
    record_property("trace", trace)
    # The first tenth warms caches; a worker is another process after a fault.
    first, last = trace[len(trace) // 10], trace[-1]
    for name in first:
        assert last[name] <= GROWTH * first[name] + 4, f"{name} grew: {trace}"


SIZES = ((128, 128), (96, 160), (192, 96), (64, 64))
assert STEPS < LONG
