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
from rig.emulated_gpu.emulated_ledger import Ledger
from rig.faults import (
    AT_FORK,
    AT_LOAD,
    AT_START,
    AT_WARM_UP,
    Fault,
    Orders,
    children,
    descendants,
    is_running,
    num_fds,
)
from rig.graphs import Graph
from rig.outputs import Pixels
from rig.server import LEDGER, Server
from rig.trees import Tree

STEPS = 3
SIZE = (128, 128)
LARGER = (320, 256)
"""For which no slot that is there is large enough."""
NUM_SEEDS = 4
KEEPS_ONE = ("--cache-classic",)
"""ComfyUI keeps the results of the last prompt only. By default later versions keep more where
there is memory, and a seed that comes again would not be computed."""
IN_FP32 = ("--fp32-unet", "--fp32-vae", "--fp32-text-enc")
LEFT_ON_A_CARD = 32 << 20
"""Bytes by which torch's allocator may keep more after a run than after one before."""
DEADLINE_S = 300.0
"""Of every wait: for a prompt whose fault is found by a timeout, for workers to come back."""
START_S, STEP_S = 180, 60
BEFORE_A_STEP = (*AT_WARM_UP, *AT_FORK, *AT_START, "store")
NEVER = "the point was never come to"
SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}


class Bench:
    """Two servers, images that are known, and what was disturbed made well again.

    Args:
        cards: kinds of emulated cards, one for each rank; without it ranks are CPU processes.
    """

    def __init__(
        self,
        servers: Callable[..., Server],
        tree: Tree,
        orders: Orders,
        *,
        num_ranks: int = 2,
        cards: str | None = None,
    ) -> None:
        self.orders = orders
        setup: dict[str, Any] = {"extra_args": KEEPS_ONE}
        ranks = {"XDIT_GPUS": f"cpu:{num_ranks}"}
        if cards is not None:
            setup = {"extra_args": (*KEEPS_ONE, *IN_FP32), "hidden": 256, "node_packs": ()}
            setup |= {"device": "emulated", "EMULATED_CARDS": cards}
            numbers = ",".join(str(card) for card in range(cards.count(",") + 1))
            # Nothing else decides there: emulated cards are too slow to be timed.
            ranks = {"XDIT_GPUS": numbers, "XDIT_STRATEGY": "ulysses"}
        self.stock = servers(tree, XDIT_STRATEGY="off", **setup)
        self.ranks = servers(
            tree,
            XDIT_START_TIMEOUT=str(START_S),
            XDIT_STEP_TIMEOUT=str(STEP_S),
            RIG_FAULTS=str(orders.path),
            **ranks,
            **setup,
        )
        self.ledger = None if cards is None else Ledger(self.ranks.base_dir / LEDGER)
        self.num_cards = 0 if cards is None else cards.count(",") + 1
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

    def check(self, fault: Fault) -> str:
        """Let a fault happen; the image is stock's, the next is parallel, and nothing is left."""
        before, shared, fds = self.pids, set(os.listdir("/dev/shm")), num_fds(self.host_pid)
        on_cards = self.bytes_on_cards()
        self.cause(fault)
        run, seconds = self.run(size=LARGER if fault.point == "slot" else SIZE)
        assert not self.orders.open(), "the fault never happened"
        fell_back = run["steps"] - run["steps_parallel"]
        assert set(run["fall_back_reasons"]) <= set(fault.reasons), run
        if fault.point not in (*BEFORE_A_STEP, "idle"):  # There it may be over by then.
            assert bool(fell_back) == bool(fault.reasons), run
        self.heal()
        left = [pid for pid in before - self.pids if is_running(pid)]
        assert not left, "half a world is left"
        assert descendants(self.host_pid) == {self.nursery_pid, *self.pids}, "what is left"
        assert set(os.listdir("/dev/shm")) <= shared
        # Those of shared memory that one prompt more has taken, not one for every fault.
        assert num_fds(self.host_pid) <= fds + 4
        self.check_cards(on_cards)
        return f"{seconds:.1f} s, {fell_back} of {run['steps']} fell back"

    def bytes_on_cards(self) -> list[tuple[int, int]]:
        """What ComfyUI, and what all others together have on each card."""
        if self.ledger is None:
            return []
        cards = [self.ledger.by_process(card) for card in range(self.num_cards)]
        hosts = [card.pop(self.host_pid, 0) for card in cards]
        return [(host, sum(card.values())) for host, card in zip(hosts, cards, strict=True)]

    def check_cards(self, before: list[tuple[int, int]]) -> None:
        """Fail if more is on a card than was before; ComfyUI may have its own copy of the model."""
        weights = self.ranks.status()["ranks"][0]["weight_bytes"] if before else 0
        for card, (then, now) in enumerate(zip(before, self.bytes_on_cards(), strict=True)):
            said = f"card {card}, ComfyUI and ranks: {then} bytes before, {now} after"
            assert now[0] <= then[0] + weights + LEFT_ON_A_CARD, said
            assert now[1] <= then[1] + LEFT_ON_A_CARD, said

    def wait_for_the_point(self) -> None:
        """Wait until the workers have come to where a fault was ordered."""
        end = time.monotonic() + DEADLINE_S
        while self.orders.open():
            assert time.monotonic() < end, NEVER
            time.sleep(0.02)
