"""The weights of the ranks, for every call: from the crew's balance, or as a run holds them.

Runs in: host process.

Weights change after a call of the model, never between a ControlNet's call and the model's: its
residuals lie on the ranks by the shares that it had.

What other programs leave of a device is read, and nothing is changed:

    CPU     what processes other than ours take of the cores that the rank may use
    CUDA    what processes other than ours take of the card's time, by NVML (package
            ``nvidia-ml-py``); without it, what others held of its memory when the worker started

A device that two programs want all the time is shared by halves, so no less than half is left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_xdit_patch.hardware.usage import open_nvml, process_ticks
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.planning.balance import Balance, Replan
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.strategy import Balancing
from comfy_xdit_patch.report.status import Totals

if TYPE_CHECKING:
    from comfy_xdit_patch.host.run import Run


LEAST = 0.5
MIN_PERIOD_S = 0.2
"""Kernel clocks tick 100 times a second: a shorter period says too little."""


class CrewBalance:
    """The balance of the ranks that live now."""

    def __init__(self, crew: Crew, *, mode: Balancing, totals: Totals) -> None:
        self._totals = totals
        self._left_over = LeftOver(crew) if mode == "least_loaded" else None
        self.current = Balance(mode, crew.world_size)
        self._num_said = 0
        self._are_launches_slow = False
        """Whether GPUs waited for their ranks' CPUs in the last call."""

    def weights(self, run: Run) -> tuple[int, ...]:
        """Weights for the next call of a run."""
        if not run.is_balanced:
            run.is_balanced = True
            if self._left_over is not None:
                self.current.follow(self._left_over.parts())
            self._say()
        return self.current.weights if run.weights is None else run.weights

    @property
    def is_at_rest(self) -> bool:
        """Whether what calls take now tells what they will take: shares are not still sought."""
        return self.current.is_at_rest or self._are_launches_slow

    def hold(self, run: Run, weights: tuple[int, ...]) -> None:
        """Leave the weights of a run as they are until it ends."""
        run.weights = weights

    def measured(
        self,
        plan: ParallelPlan,
        workload: Workload,
        busy_s: Sequence[float],
        *,
        is_launch_bound: bool = False,
        model: int,
        replan: Replan,
    ) -> None:
        """Learn from what each rank computed in a call.

        Args:
            is_launch_bound: a rank's CPU set its pace: that says nothing of its GPU.
        """
        self._are_launches_slow = is_launch_bound
        if is_launch_bound:
            return
        kind = model, workload
        if self.current.measured(plan, workload, busy_s, kind=kind, replan=replan):
            if self._left_over is not None:
                self.current.learned_under(self._left_over.parts())
            self._say()

    def _say(self) -> None:
        self._totals.weights = self.current.weights
        self._totals.share_changes += self.current.num_changes - self._num_said
        self._num_said = self.current.num_changes


Ticks = dict[int, float]


class LeftOver:
    """The devices of a crew, looked at from time to time."""

    def __init__(self, crew: Crew) -> None:
        self._workers = crew.workers
        self._joined = crew.joined
        self._cores = _Cores()
        self._parts = (1.0,) * crew.world_size

    def parts(self) -> tuple[float, ...]:
        """Part of each rank's device that others left since the last look."""
        if self._workers[0].device.is_cpu:
            taken = self._cores.taken([worker.process.pid for worker in self._workers])
        else:
            taken = self._of_cards()
        if len(taken) == len(self._workers):
            self._parts = tuple(max(LEAST, 1.0 - part) for part in taken)
        return self._parts

    def _of_cards(self) -> list[float]:
        own = {os.getpid(), *(worker.process.pid for worker in self._workers)}
        found = []
        for rank, worker in enumerate(self._workers):
            busy = time_taken(worker.device.uuid or "", own)
            if busy is None:
                joined = self._joined[rank]
                # On the first card this is ComfyUI, which gives way.
                is_others = rank > 0 and joined.total_bytes > 0
                busy = 1 - joined.free_bytes / joined.total_bytes if is_others else 0.0
            found.append(busy)
        return found


def time_taken(uuid: str, own: Collection[int]) -> float | None:
    """Part of a card's time that processes other than our own take; None if NVML does not say."""
    nvml = open_nvml()
    if nvml is None:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        if nvml.nvmlDeviceGetUtilizationRates(handle).gpu == 0:
            return 0.0  # and no samples of processes, which would be an error
        since_us = int((time.time() - 1.0) * 1e6)
        samples = nvml.nvmlDeviceGetProcessUtilization(handle, since_us)
    except nvml.NVMLError:
        return None
    latest: dict[int, tuple[int, float]] = {}
    for sample in samples:
        entry = sample.timeStamp, sample.smUtil / 100
        latest[sample.pid] = max(entry, latest.get(sample.pid, (0, 0.0)))
    return min(1.0, sum(part for pid, (_, part) in latest.items() if pid not in own))


class _Cores:
    """Time of CPU cores, and what of it our own ranks took."""

    def __init__(self) -> None:
        self._then_s = 0.0
        self._busy: Ticks = {}
        self._own: Ticks = {}
        self._found: list[float] = []

    def taken(self, pids: list[int]) -> list[float]:
        """Part of each rank's cores that others took since the last look; empty at the first.

        A process of ours that may use several cores is taken to use them alike.
        """
        now_s = time.monotonic()
        if now_s - self._then_s < MIN_PERIOD_S:
            return self._found
        ours = (*pids, os.getpid())
        try:
            busy, own = core_ticks(), {pid: process_ticks(pid) for pid in ours}
            cores = {pid: os.sched_getaffinity(pid) for pid in ours}
        except (OSError, ValueError, IndexError):  # a rank that ends just now
            return self._found
        ticks = (now_s - self._then_s) * os.sysconf("SC_CLK_TCK")
        if self._own.keys() == own.keys():
            of_core = {core: busy[core] - self._busy.get(core, 0.0) for core in busy}
            for pid in ours:
                for core in cores[pid]:
                    of_core[core] -= (own[pid] - self._own[pid]) / len(cores[pid])
            parts = [sum(of_core[core] for core in cores[pid]) / len(cores[pid]) for pid in pids]
            self._found = [min(1.0, max(0.0, part / ticks)) for part in parts]
        else:
            self._found = []
        self._then_s, self._busy, self._own = now_s, busy, own
        return self._found


def core_ticks(path: str = "/proc/stat") -> Ticks:
    """Clock ticks that each core has worked since boot; idle and waiting for disks are not work."""
    found = {}
    for line in Path(path).read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _, _, irq, soft = map(int, values[:7])
            found[int(name[3:])] = float(user + nice + system + irq + soft)
    return found
