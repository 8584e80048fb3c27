"""``XDIT_STRATEGY=auto``: try the exact plans there are and ComfyUI alone, and take the fastest.

Runs in: host process.

A strategy that the user named is never measured, and nothing is under ``XDIT_STRICT=1``: who asks
for either wants the ranks.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pace.case import Case, machine_text
from comfy_xdit_patch.host.pace.verdict_store import VerdictStore, text_of
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.host.reading.compiled import is_compiled
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.strategy import Strategy
from comfy_xdit_patch.planning.transfers import TransferDtype
from comfy_xdit_patch.planning.verdict import NUM_WATCHED, ONE, Trial, Verdict, size_class
from comfy_xdit_patch.settings import Settings

log = logging.getLogger("comfy_xdit_patch")

ONE_IS_FASTER = Refusal("one GPU is faster for this model and size, as XDIT_STRATEGY=auto measured")


@dataclass(slots=True)
class Record:
    """What is known of one kind of call, and what is being measured."""

    verdict: Verdict | None
    at_begin: Verdict | None = None
    """The verdict with which this run began."""
    trial: Trial = field(default_factory=Trial)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_WATCHED))
    """What the last steps of the ranks took, under the verdict."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call, the way that a step of it goes, and the ways it is compared with."""

    case: Case
    record: Record
    way: str
    ways: tuple[str, ...] = ()
    """Empty under a verdict: then the step is watched."""
    apart: frozenset[str] = frozenset()

    @property
    def is_one(self) -> bool:
        """Whether ComfyUI is to compute the step in its own process, to be timed."""
        return self.way == ONE

    @property
    def one_seconds(self) -> float | None:
        """What a step takes in ComfyUI alone, if that was measured."""
        verdict = self.record.verdict
        pace = verdict.paces.get(ONE) if verdict else None
        return pace.median_s if pace else None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan of a call. ``kind`` is set if its time tells something."""

    strategy: Strategy
    plan: ParallelPlan
    kind: Kind | None


class Auto:
    """What was measured in this process, and in earlier ones."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.is_on = settings.strategy.name == "auto" and not settings.strict
        self._captures = settings.captures
        self._pool = pool
        self._transfer_dtype: TransferDtype = settings.transfer_dtype
        self._store = VerdictStore()
        self.records: dict[Case, Record] = {}
        """What is known of each kind of call since this process started, the last seen last."""
        self._machine = ""
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def turn(
        self,
        call: Call,
        plans: Mapping[Strategy, ParallelPlan],
        *,
        is_plain: bool,
        is_at_rest: bool,
        can_time_one: Callable[[], bool],
    ) -> Chosen | Refusal:
        """Say which plan a call has, or that ComfyUI alone is faster.

        Args:
            plans: that the call can have, the usual one first.
            is_plain: whether the time of this call tells that of others. One that does not follows
                the verdict with which its run began: what ranks keep from step to step stays good.
            is_at_rest: whether shares are not still sought, by what the ranks take.
            can_time_one: whether ComfyUI's own forward would take what it takes without workers.
        """
        case = self._case(call.module, call.workload, call.model)
        record = self._record(case, call.run)
        chosen = {plan.name: Chosen(strategy, plan, None) for strategy, plan in plans.items()}
        usual = next(iter(chosen.values()))
        if is_plain and is_at_rest:
            kind = self._trial(case, record, plans, can_time_one)
            if kind is not None:
                return replace(chosen.get(kind.way, usual), kind=kind)
        verdict = record.verdict if is_plain else record.at_begin
        if verdict is None:
            return usual
        if verdict.taken == ONE:
            # Before a second look the ranks must run: by that their shares come to rest.
            if is_plain and verdict.is_doubted(time.time()) and can_time_one():
                return usual
            return ONE_IS_FASTER
        taken = chosen.get(verdict.taken, usual)
        is_watched = is_plain and is_at_rest
        return replace(taken, kind=Kind(case, record, taken.plan.name) if is_watched else None)

    def forget(self) -> None:
        """Measure everything anew. To be called between runs."""
        self._store.clear()
        self.records.clear()

    def taken(self, flux: Any, call: Call) -> str | None:
        """Name what calls of FLUX have in this run beside this one, a ControlNet's; None: unknown.

        Args:
            flux: the model that the ControlNet steers.
        """
        record = self._record(self._case(flux, call.workload, call.run.model), call.run)
        return record.at_begin.taken if record.at_begin else None

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
        self.took(kind, time.perf_counter() - start)
        return out

    def took(self, kind: Kind, seconds: float) -> None:
        """Note what a step took."""
        record = kind.record
        if not kind.ways:
            self._watch(record, seconds)
            return
        record.trial.took(kind.way, seconds)
        if record.trial.due(kind.ways, kind.apart) is None:
            self._conclude(kind.case, record, kind.ways)

    def _record(self, case: Case, run: Run) -> Record:
        """What is known of a kind of call; the first of its kind in a run begins the run there."""
        record = self.records.pop(case, None) or Record(self._store.find(case))
        self.records[case] = record
        if case not in run.paced:
            run.paced.add(case)
            self._begin_run(case, record)
        return record

    def _trial(
        self,
        case: Case,
        record: Record,
        plans: Mapping[Strategy, ParallelPlan],
        can_time_one: Callable[[], bool],
    ) -> Kind | None:
        """Return the next step of a trial; None if there is nothing to try."""
        verdict = record.verdict
        names = tuple(plan.name for plan in plans.values())
        is_known = verdict is not None and verdict.paces.keys() >= {*names}
        is_doubted = verdict is not None and verdict.is_doubted(time.time())
        if verdict is not None and is_known and ONE in verdict.paces and not is_doubted:
            return None
        # The driver is asked for its memory, and only while that decides something.
        if can_time_one():
            names = (*names, ONE)
        elif verdict is not None and (is_known or verdict.taken == ONE):
            return None
        if len(names) == 1:
            return None
        apart = frozenset(plan.name for plan in plans.values() if plan.tensor > 1)
        apart -= {names[0]}
        way = record.trial.due(names, apart)
        if way is None:  # Those that were missing cannot be had any more.
            self._conclude(case, record, names)
            return None
        record.trial.give(way)
        return Kind(case, record, way, names, apart)

    def _conclude(self, case: Case, record: Record, ways: tuple[str, ...]) -> None:
        verdict = record.trial.verdict(ways, time.time())
        record.trial = Trial()
        if verdict is None:
            return
        record.verdict = verdict
        record.recent.clear()
        log.info("xDiT: %s", _text(verdict, self._pool))
        self._store.keep(case, verdict)

    def _watch(self, record: Record, seconds: float) -> None:
        """Doubt a verdict for the ranks when they have become slower than one was."""
        one = record.verdict.paces.get(ONE) if record.verdict else None
        record.recent.append(seconds)
        are_enough = len(record.recent) == NUM_WATCHED
        if one is not None and are_enough and statistics.median(record.recent) > one.median_s:
            record.verdict = None
            record.recent.clear()

    def _begin_run(self, case: Case, record: Record) -> None:
        record.trial.begin_run()
        record.at_begin = verdict = record.verdict
        if verdict is not None and verdict.taken == ONE:
            record.verdict = replace(verdict, num_runs=verdict.num_runs + 1)
            self._store.keep(case, record.verdict)

    def _case(self, flux: Any, workload: Workload, base_model: Any) -> Case:
        if not self._machine:
            comfy = sys.modules.get("comfy")
            self._machine = machine_text(
                self._pool.devices,
                torch_version=torch.__version__,
                num_threads=torch.get_num_threads(),
                transfer_dtype=self._transfer_dtype,
                comfyui=Path(next(iter(comfy.__path__))).parent if comfy else None,
            )
        if flux not in self._sizes:
            self._sizes[flux] = sum(parameter.nbytes for parameter in flux.parameters())
        model = f"{type(flux).__name__}, {self._sizes[flux]} bytes"
        if is_compiled(getattr(base_model, "current_patcher", None)):
            model += ", compiled"
        if self._captures:
            model += ", CUDA graphs"
        return Case(self._machine, model, size_class(workload))


def _finish(device: torch.device) -> None:
    """Wait for the kernels that were launched on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _text(verdict: Verdict, pool: Pool) -> str:
    way = "ComfyUI alone" if verdict.taken == ONE else verdict.taken
    return (
        f"measured {text_of(verdict)} on {pool.world_size} {pool.device_word}: {way} is the "
        f"fastest for this model and size, and this is remembered"
    )
