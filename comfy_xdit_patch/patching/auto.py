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
from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.observability.verdict_store import Case, VerdictStore
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.verdict import Trial, Verdict, Way, size_class
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.workers.pool import Pool

log = logging.getLogger("comfy_xdit_patch")

ONE_IS_FASTER = Refusal("one GPU is faster for this model and size, as XDIT_STRATEGY=auto measured")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call, and what was measured of it."""

    case: Case
    trial: Trial


class Auto:
    """What was measured in this process, and in earlier ones."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self._is_on = settings.strategy.name == "auto" and not settings.strict
        self._pool = pool
        self._store = VerdictStore()
        self._trials: dict[Case, Trial] = {}
        self._names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    def kind(self, flux: Any, workload: Workload, plan: ParallelPlan) -> Kind | None:
        """What a call is to ``auto``; None if it is not asked."""
        if not self._is_on:
            return None
        case = Case(self._machine(), self._model(flux), size_class(workload))
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

    def time_one(self, kind: Kind, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute a step in ComfyUI's own process, and note what it takes."""
        start = time.perf_counter()
        out = compute()
        _finish(out)
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

    def _model(self, flux: Any) -> str:
        """Class, size in bytes and so the stored precision, and whether ComfyUI compiles it."""
        if flux not in self._names:
            num_bytes = sum(parameter.nbytes for parameter in flux.parameters())
            self._names[flux] = f"{type(flux).__name__}, {num_bytes} bytes"
        return self._names[flux]


def _finish(out: torch.Tensor) -> None:
    """Wait for the kernels that make a tensor."""
    if out.device.type == "cuda":
        torch.cuda.synchronize(out.device)


def _text(verdict: Verdict, pool: Pool) -> str:
    return (
        f"measured {verdict.several_s * 1000:.0f} ms a step on {pool.world_size} "
        f"{pool.device_word} ({verdict.plan}) and {verdict.one_s * 1000:.0f} ms in ComfyUI alone: "
        f"{'the ranks are' if verdict.is_several else 'ComfyUI alone is'} faster for this model "
        f"and size, and this is remembered"
    )
