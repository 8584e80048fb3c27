"""Every fault at every point of every rank: the image is stock's, and the next is parallel again.

The faults are real, in real processes: signals, exceptions, shut connections, torn messages. The
default run takes one of each mechanism; ``FAULTS_ALL=1`` takes the whole matrix on 2 ranks, and
``FAULTS_RANKS=3`` takes it on 3. ``FAULTS_CASES`` is a pattern that picks cases by name.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from rig import graphs
from rig.compare import compare_all
from rig.environment import RigError
from rig.faults import (
    AT_LOAD,
    AT_START,
    SOME_FAULTS,
    Fault,
    Orders,
    all_faults,
    children,
    is_running,
    num_fds,
)
from rig.server import Server
from rig.trees import Tree

pytestmark = [pytest.mark.group("faults"), pytest.mark.usefixtures("newest_only")]

STEPS = 3
SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}
DEADLINE_S = 120.0
"""Of every wait: for a prompt whose fault is found by a timeout, for workers to come back."""
START_S, STEP_S = 60, 60

Servers = Callable[..., Server]
Record = Callable[[str, object], None]


def chosen() -> list[Fault]:
    everything = "FAULTS_ALL" in os.environ or "FAULTS_RANKS" in os.environ
    faults = all_faults(num_ranks()) if everything else list(SOME_FAULTS)
    return [fault for fault in faults if re.search(os.environ.get("FAULTS_CASES", ""), fault.name)]


def num_ranks() -> int:
    return int(os.environ.get("FAULTS_RANKS", "2"))


class Bench:
    """One server with ranks, a stock one, and images that are known."""

    def __init__(self, servers: Servers, tree: Tree, orders: Orders) -> None:
        self.orders = orders
        self.stock = servers(tree, XDIT_STRATEGY="off")
        self.ranks = servers(
            tree,
            XDIT_GPUS=f"cpu:{num_ranks()}",
            XDIT_START_TIMEOUT=str(START_S),
            XDIT_STEP_TIMEOUT=str(STEP_S),
            RIG_FAULTS=str(orders.path),
        )
        self._seeds = cycle(range(700, 704))
        self._expected: dict[int, Any] = {}
        self.pids: set[int] = set()

    def run(self) -> tuple[dict[str, Any], float]:
        """Make an image, compare it; return what is said of its run, and its seconds."""
        seed = next(self._seeds)
        graph = graphs.load("ksampler_dev")
        graph = graphs.with_values(graph, seed=seed, size=(128, 128), steps=STEPS, save_latent=True)
        if seed not in self._expected:
            self._expected[seed] = self.stock.images(self.stock.run(graph, DEADLINE_S))
        start = time.monotonic()
        history = self.ranks.run(graph, DEADLINE_S)
        seconds = time.monotonic() - start
        difference = compare_all(self._expected[seed], self.ranks.images(history))
        assert difference.is_equal, str(difference)
        status = self.ranks.status()
        return status["last_run"], seconds

    def heal(self) -> None:
        """Wait for the workers; the next image is parallel."""
        end = time.monotonic() + DEADLINE_S
        while self.ranks.status()["state"] != "ready":
            assert time.monotonic() < end, self.ranks.status()
            time.sleep(0.1)
        run, _ = self.run()
        assert run["steps_parallel"] == run["steps"] == STEPS, run
        self.pids = {rank["pid"] for rank in self.ranks.status()["ranks"]}

    def cause(self, fault: Fault) -> None:
        """Bring about that the point of a fault is come to; a step comes with the next image."""
        if fault.point == "idle":
            os.kill(sorted(self.pids)[int(fault.rank)], SIGNALS[fault.kind])
            return
        if fault.point in (*AT_LOAD, "slot"):
            self.free()
        self.orders.give(fault)
        if fault.point in (*AT_START, "store"):
            os.kill(min(self.pids), signal.SIGKILL)
        if fault.point == "unload":
            self.ranks.free()
        if fault.point in (*AT_START, "store", "unload"):
            self.wait_until_taken()

    def wait_until_taken(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while self.orders.open():
            assert time.monotonic() < end, "the point was never come to"
            time.sleep(0.02)

    def free(self) -> None:
        """Have the workers drop the model, so that the next step loads it."""
        self.ranks.free()
        end = time.monotonic() + 30
        while any(rank["weight_bytes"] for rank in self.ranks.status()["ranks"]):
            assert time.monotonic() < end, "never freed"
            time.sleep(0.05)


@pytest.mark.slow  # workers start anew after most of them
def test_every_fault_costs_time_and_nothing_else(
    servers: Servers,
    tree: Tree,
    tmp_path_factory: pytest.TempPathFactory,
    record_property: Record,
) -> None:
    orders = Orders(Path(tmp_path_factory.mktemp("orders")))
    bench = Bench(servers, tree, orders)
    host = bench.ranks.process
    assert host is not None
    bench.run()  # the first one starts the workers
    bench.heal()
    shared, fds = set(os.listdir("/dev/shm")), num_fds(host.pid)
    failures = []
    for fault in chosen():
        before = bench.pids
        try:
            bench.cause(fault)
            run, seconds = bench.run()
            assert not orders.open(), "the fault never happened"
            fell_back = run["steps"] - run["steps_parallel"]
            assert set(run["fall_back_reasons"]) <= set(fault.reasons), run
            if fault.point not in (*AT_START, "store", "idle"):  # There it may be over by then.
                assert bool(fell_back) == bool(fault.reasons), run
            bench.heal()
            gone = before - bench.pids
            assert not [pid for pid in gone if is_running(pid)], "half a world is left"
            assert children(host.pid) == bench.pids, "processes are left"
            assert set(os.listdir("/dev/shm")) <= shared
            # Those of shared memory that one prompt more has taken, not one for every fault.
            assert num_fds(host.pid) <= fds + 4
            record_property(fault.name, f"{seconds:.1f} s, {fell_back} of {run['steps']} fell back")
        except (AssertionError, RigError, OSError) as error:
            failures.append(f"{fault.name}: {type(error).__name__}: {error}")
            for path in orders.path.iterdir():
                path.unlink()
            bench.heal()
    assert not failures, f"{len(failures)} of {len(chosen())} failed:\n" + "\n".join(failures)
