"""``XDIT_STRATEGY=auto``: measure all ranks against ComfyUI alone, and take what is faster.

Runs in: host process.

A strategy that the user named is never measured, and nothing is under ``XDIT_STRICT=1``: who asks
for either wants the ranks.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from comfy_xdit_patch import __version__
from comfy_xdit_patch.errors import Refusal, WorkerError
from comfy_xdit_patch.host.pace.machine import Measuring
from comfy_xdit_patch.host.pace.verdict_store import Case, VerdictStore
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.planning.cost.choice import AUTO, choose
from comfy_xdit_patch.planning.cost.job import Job, job_of
from comfy_xdit_patch.planning.cost.machine import Machine
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.strategy import PLAN, Strategy, parse_strategy
from comfy_xdit_patch.planning.verdict import Trial, Verdict, Way, size_class
from comfy_xdit_patch.settings import Settings

log = logging.getLogger("comfy_xdit_patch")

MARGIN = 0.1
"""What a plan must promise over the usual one: predictions among plans are off by less on the
published machines (docs/planning.md), and by more on CPU ranks."""

ONE_IS_FASTER = Refusal("one GPU is faster for this model and size, as XDIT_STRATEGY=auto measured")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call, and what was measured of it."""

    case: Case
    trial: Trial


class Auto:
    """What was measured in this process, and in earlier ones."""

    def __init__(self, settings: Settings, pool: Pool, measuring: Measuring) -> None:
        self._is_on = settings.strategy.name == "auto" and not settings.strict
        self._measuring = measuring
        self._pool = pool
        self._store = VerdictStore()
        self._trials: dict[Case, Trial] = {}
        self._strategies: dict[Case, Strategy | None] = {}
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def strategy(
        self, flux: Any, workload: Workload, default: ParallelPlan, dtype: torch.dtype, poll: Poll
    ) -> Strategy | None:
        """Return the plan of all ranks that was measured, or promises most; None for the default.

        The first call of a kind that was never measured has the ranks measure the machine.
        """
        if not self._is_on:
            return None
        case = self._case(flux, workload)
        if case not in self._strategies:
            verdict = self._store.find(case)
            if verdict is not None:
                self._strategies[case] = parse_strategy(verdict.plan)
                return self._strategies[case]
            try:
                machine = self._measuring.machine(poll)
            except WorkerError:
                return None  # Whoever needs them next says so.
            job = job_of(flux, workload, num_bytes=self._bytes(flux), dtype=dtype)
            self._strategies[case] = None if machine is None else _best(job, machine, default)
        return self._strategies[case]

    def kind(self, flux: Any, workload: Workload, plan: ParallelPlan) -> Kind | None:
        """What a call is to ``auto``; None if it is not asked."""
        if not self._is_on:
            return None
        case = self._case(flux, workload)
        trial = self._trials.get(case)
        if trial is None or trial.plan != plan.name:
            found = self._store.find(case)
            is_same = found is not None and found.plan == plan.name
            trial = self._trials[case] = Trial(plan.name, verdict=found if is_same else None)
        return Kind(case, trial)

    def verdict(self, kind: Kind | None) -> Refusal | None:
        """Refuse the ranks if one GPU was faster."""
        if kind is not None and kind.trial.way() is Way.NOT_SEVERAL:
            return ONE_IS_FASTER
        return None

    def time_one(
        self, kind: Kind, compute: Callable[[], torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Compute a step in ComfyUI's own process, and note what it takes.

        Args:
            device: that ComfyUI computes on; what it has to do before the step is not the step's.
        """
        _finish(device)
        start = time.perf_counter()
        out = compute()
        _finish(device)
        self.took(kind, time.perf_counter() - start, is_several=False)
        return out

    def took(self, kind: Kind, seconds: float, *, is_several: bool) -> None:
        """Note what a step took."""
        verdict = kind.trial.took(seconds, is_several=is_several)
        if verdict is not None:
            log.info("xDiT: %s", _text(verdict, self._pool))
            self._store.keep(kind.case, verdict)

    def _machine(self) -> str:
        devices = self._pool.devices
        names = sorted({device.name for device in devices})
        parts = [f"{len(devices)} x {' + '.join(names)}"]
        if devices[0].is_cpu:
            # What the kernel lets this process and its workers use.
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            parts.append(f"cores {cores}, {torch.get_num_threads()} threads in ComfyUI")
        return ", ".join([*parts, f"torch {torch.__version__}, comfy-xdit-patch {__version__}"])

    def _case(self, flux: Any, workload: Workload) -> Case:
        model = f"{type(flux).__name__}, {self._bytes(flux)} bytes"
        return Case(self._machine(), model, size_class(workload))

    def _bytes(self, flux: Any) -> int:
        if flux not in self._sizes:
            self._sizes[flux] = sum(parameter.nbytes for parameter in flux.parameters())
        return self._sizes[flux]


def _best(job: Job, machine: Machine, default: ParallelPlan) -> Strategy | None:
    """Return the plan of all ranks that is predicted to be the fastest, if it is so by far."""
    choice = choose(job, machine, world_size=default.world_size)
    if isinstance(choice, Refusal):
        return None
    seconds = {
        (option.plan.batch, option.plan.ulysses, option.plan.ring): option.time.total_s
        for option in reversed(choice.options)  # of several places for the weights the fastest
        if AUTO.allows(option.plan) and option.plan.world_size == default.world_size
    }
    usual = seconds.get((default.batch_degree, default.ulysses_degree, default.ring_degree))
    if usual is None:
        return None
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > usual * (1 - MARGIN):
        return None
    batch, ulysses, ring = best
    return Strategy(PLAN, batch=batch, ulysses=ulysses, ring=ring)


def _finish(device: torch.device) -> None:
    """Wait for the kernels that were launched on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _text(verdict: Verdict, pool: Pool) -> str:
    return (
        f"measured {verdict.several_s * 1000:.0f} ms a step on {pool.world_size} "
        f"{pool.device_word} ({verdict.plan}) and {verdict.one_s * 1000:.0f} ms in ComfyUI alone: "
        f"{'the ranks are' if verdict.is_several else 'ComfyUI alone is'} faster for this model "
        f"and size, and this is remembered"
    )
