"""One server with ranks and a stock one, for tests that disturb the first.

Runs in: the rig's environment.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from rig import graphs
from rig.compare import compare_all
from rig.faults import AT_FORK, AT_LOAD, AT_START, AT_WARM_UP, Fault, Orders, children
from rig.graphs import Graph
from rig.outputs import Pixels
from rig.server import Server
from rig.trees import Tree

STEPS = 3
SIZE = (128, 128)
LARGER = (320, 256)
"""For which no slot that is there is large enough."""
NUM_SEEDS = 4
KEEPS_ONE = ("--cache-classic",)
"""ComfyUI keeps the results of the last prompt only. By default later versions keep more where
there is memory, and a seed that comes again would not be computed."""
DEADLINE_S = 300.0
"""Of every wait: for a prompt whose fault is found by a timeout, for workers to come back."""
START_S, STEP_S = 180, 60
BEFORE_A_STEP = (*AT_WARM_UP, *AT_FORK, *AT_START, "store")
NEVER = "the point was never come to"
SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}


class Bench:
    """Two servers, images that are known, and what was disturbed made well again."""

    def __init__(
        self, servers: Callable[..., Server], tree: Tree, orders: Orders, *, num_ranks: int = 2
    ) -> None:
        self.orders = orders
        self.stock = servers(tree, extra_args=KEEPS_ONE, XDIT_STRATEGY="off")
        self.ranks = servers(
            tree,
            extra_args=KEEPS_ONE,
            XDIT_GPUS=f"cpu:{num_ranks}",
            XDIT_START_TIMEOUT=str(START_S),
            XDIT_STEP_TIMEOUT=str(STEP_S),
            RIG_FAULTS=str(orders.path),
        )
        self.pids: set[int] = set()
        self._expected: dict[tuple[int, int, tuple[int, int]], list[Pixels]] = {}
        self._number = 0

    @property
    def host_pid(self) -> int:
        assert self.ranks.process is not None
        return self.ranks.process.pid

    @property
    def nursery_pid(self) -> int:
        (pid,) = children(self.host_pid)
        return pid

    def graph_of(self, *, steps: int = STEPS, size: tuple[int, int] = SIZE) -> tuple[int, Graph]:
        """A graph that ComfyUI has not just made, and its seed."""
        self._number += 1
        seed = 700 + self._number % NUM_SEEDS
        graph = graphs.load("ksampler_dev")
        return seed, graphs.with_values(graph, seed=seed, size=size, steps=steps, save_latent=True)

    def image_of(
        self, *, steps: int = STEPS, size: tuple[int, int] = SIZE
    ) -> tuple[list[Pixels], Graph]:
        """A graph, and what stock ComfyUI makes of it."""
        seed, graph = self.graph_of(steps=steps, size=size)
        key = seed, steps, size
        if key not in self._expected:
            self._expected[key] = self.stock.images(self.stock.run(graph, DEADLINE_S))
        return self._expected[key], graph

    def compare(self, expected: list[Pixels], history: dict[str, Any]) -> None:
        """Fail if the server with ranks made another image."""
        difference = compare_all(expected, self.ranks.images(history))
        assert difference.is_equal, str(difference)

    def run(self, *, size: tuple[int, int] = SIZE) -> tuple[dict[str, Any], float]:
        """Make an image, compare it; return what is said of its run, and its seconds."""
        expected, graph = self.image_of(size=size)
        start = time.monotonic()
        history = self.ranks.run(graph, DEADLINE_S)
        seconds = time.monotonic() - start
        self.compare(expected, history)
        return self.ranks.status()["last_run"], seconds

    def heal(self) -> None:
        """Wait for the workers; the next image is parallel."""
        end = time.monotonic() + DEADLINE_S
        while self.ranks.status()["state"] != "ready":
            assert time.monotonic() < end, self.ranks.status()
            if self.ranks.status()["state"] in ("idle", "broken"):
                self.run()  # which starts them
            time.sleep(0.1)
        run, _ = self.run()
        assert run["steps_parallel"] == run["steps"] == STEPS, run
        self.pids = {rank["pid"] for rank in self.ranks.status()["ranks"]}

    def cause(self, fault: Fault) -> None:
        """Bring about that the point of a fault is come to; a step comes with the next image."""
        if fault.point == "idle":
            ranks = self.ranks.status()["ranks"]
            is_nursery = fault.rank == "nursery"
            pid = self.nursery_pid if is_nursery else ranks[int(fault.rank)]["pid"]
            os.kill(pid, SIGNALS[fault.kind])
            return
        if fault.point in AT_LOAD:
            self.ranks.free_and_wait()
        self.orders.give(fault)
        if fault.point in AT_WARM_UP:
            os.kill(self.nursery_pid, signal.SIGKILL)
        elif fault.point in BEFORE_A_STEP:
            os.kill(min(self.pids), signal.SIGKILL)
        if fault.point == "unload":
            self.ranks.free_until(lambda: not self.orders.open(), DEADLINE_S, NEVER)
        if fault.point in BEFORE_A_STEP:
            self.wait_for_the_point()

    def wait_for_the_point(self) -> None:
        """Wait until the workers have come to where a fault was ordered."""
        end = time.monotonic() + DEADLINE_S
        while self.orders.open():
            assert time.monotonic() < end, NEVER
            time.sleep(0.02)
