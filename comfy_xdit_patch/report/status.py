"""The one status object: every figure in it was counted or measured.

Runs in: host process. Tests, the summary line, the doctor and ``GET /xdit/status`` read it.

A *step* here is one call of the diffusion model, which is what the ranks compute together; some
samplers make two in a denoising step.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from comfy_xdit_patch.planning.plan import ParallelPlan


@dataclass(frozen=True, slots=True)
class RunReport:
    """One finished sampling run. ``ms_per_step`` is the median over parallel steps.

    A measured step is one that ComfyUI computed alone, to be compared; ``speedup`` is what came out
    of that, for this kind of step, in this run or an earlier one.

    A gathered step is a parallel one in which a node's code around the blocks ran in the host; a
    skipped one is a step in which a node had no block run, or computed them itself.
    """

    steps: int
    steps_parallel: int
    steps_fell_back: int
    steps_gathered: int
    steps_skipped: int
    steps_measured: int
    gather_reasons: dict[str, int]
    fall_back_reasons: dict[str, int]
    ms_per_step: float | None
    speedup: float | None
    strategy: str | None
    plan: str | None
    is_exact: bool
    """Not with PipeFusion, but for its first calls."""
    steps_warm_up: int
    """Exact calls of PipeFusion."""
    ranks: int


@dataclass(slots=True)
class RunCounts:
    """Counts of a run that is going on."""

    plan: ParallelPlan | None = None
    parallel_seconds: list[float] = field(default_factory=list)
    fall_backs: Counter[str] = field(default_factory=Counter)
    gathered: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    measured: int = 0
    one_seconds: float | None = None
    """What ``auto`` once measured for a step of this kind in ComfyUI alone."""
    warm_ups: int = 0

    def add(self, other: RunCounts) -> None:
        """Count another run's steps too."""
        self.plan = other.plan or self.plan
        self.parallel_seconds += other.parallel_seconds
        self.fall_backs += other.fall_backs
        self.gathered += other.gathered
        self.skipped += other.skipped
        self.measured += other.measured
        self.one_seconds = other.one_seconds or self.one_seconds
        self.warm_ups += other.warm_ups

    def report(self, *, ranks: int) -> RunReport:
        parallel = len(self.parallel_seconds)
        fell_back = sum(self.fall_backs.values())
        median = statistics.median(self.parallel_seconds) if parallel else None
        return RunReport(
            steps=parallel + fell_back + self.skipped + self.measured,
            steps_parallel=parallel,
            steps_fell_back=fell_back,
            steps_gathered=sum(self.gathered.values()),
            steps_skipped=self.skipped,
            steps_measured=self.measured,
            gather_reasons=dict(self.gathered),
            fall_back_reasons=dict(self.fall_backs),
            ms_per_step=None if median is None else median * 1000,
            speedup=self.one_seconds / median if self.one_seconds and median else None,
            strategy=self.plan.strategy if parallel and self.plan else None,
            plan=self.plan.name if self.plan else None,
            is_exact=self.plan is None or self.plan.is_exact,
            steps_warm_up=self.warm_ups,
            ranks=ranks if parallel else 1,
        )


@dataclass(slots=True)
class Totals:
    """Counts since ComfyUI started. They are for people: nothing decides by them."""

    runs: int = 0
    steps_parallel: int = 0
    steps_gathered: int = 0
    """Parallel steps in which a node's code around the blocks ran in the host."""
    steps_skipped: int = 0
    """Steps in which a node had no block run, or computed them itself."""
    steps_measured: int = 0
    """Steps that ComfyUI computed alone because ``auto`` compared."""
    fall_backs: Counter[str] = field(default_factory=Counter)
    bytes_to_workers: int = 0
    bytes_from_workers: int = 0
    bytes_between_ranks: int = 0
    bytes_weights: int = 0
    """Weight tensors put into shared memory: LoRA matrices, models to merge or without a file."""
    loads: int = 0
    """How often the workers read a model."""
    gave_way: int = 0
    """How often a worker gave its device's memory back because ComfyUI wanted it."""
    weights_verified: int = 0
    """Weights compared bit for bit with ComfyUI's own, counted for each rank."""
    controls_parallel: int = 0
    """Calls of a ControlNet that the ranks computed together."""
    controls_alone: Counter[str] = field(default_factory=Counter)
    """Calls of a ControlNet that ComfyUI computed, by reason, in steps that are parallel."""
    control_seconds: dict[int, float] = field(default_factory=dict)
    """What each rank needed for the last call of a ControlNet."""
    decodes_parallel: int = 0
    """Latents that the ranks decoded together."""
    decodes_alone: Counter[str] = field(default_factory=Counter)
    """Latents large enough that ComfyUI decoded while ranks were there, by reason."""
    decode_seconds: float | None = None
    """What the last decoding on the ranks took, in the host."""
    num_forwards: dict[int, int] = field(default_factory=dict)
    load_seconds: dict[int, float] = field(default_factory=dict)
    residency: list[str] = field(default_factory=list)
    """The arithmetic that decided where the weights of the last step lie."""
    step_seconds: dict[int, float] = field(default_factory=dict)
    """What each rank needed for the last step, from the message to the written result."""
    busy_seconds: dict[int, float] = field(default_factory=dict)
    """What each rank computed in the last step, without what it waited for others."""
    launch_bound: dict[int, bool] = field(default_factory=dict)
    """Whether each rank's CPU, and not its GPU, set the pace of the last step."""
    weights: tuple[int, ...] = ()
    """Relative speed of the ranks, by which work is shared; none while shares are even."""
    share_changes: int = 0
    """How often the weights changed since the workers started."""
    host_step_seconds: float | None = None
    """What the last step took in the host. The difference is transport and wake-up."""
    last_loss_unix_s: float | None = None
    """When a worker was last lost and its step handed back to ComfyUI."""
    last_run: RunReport | None = None
    last_error: str | None = None

    def of_rank(self, rank: int) -> dict[str, Any]:
        """What the status says of one rank."""
        return {
            "forwards": self.num_forwards.get(rank, 0),
            "load_s": self.load_seconds.get(rank),
            "busy_s": self.busy_seconds.get(rank),
            "is_launch_bound": self.launch_bound.get(rank),
        }

    def last_plan(self) -> dict[str, Any] | None:
        """How the last run was shared, as JSON."""
        last = self.last_run
        if last is None or last.plan is None:
            return None
        return {"strategy": last.strategy, "world_size": last.ranks, "degrees": last.plan}

    def to_dict(self) -> dict[str, Any]:
        """The part of the status that is counts."""
        last = self.last_run
        return {
            "runs": self.runs,
            "steps_parallel": self.steps_parallel,
            "steps_gathered": self.steps_gathered,
            "steps_skipped": self.steps_skipped,
            "steps_measured": self.steps_measured,
            "steps_fell_back": sum(self.fall_backs.values()),
            "fall_back_reasons": dict(self.fall_backs),
            "bytes": {
                "to_workers": self.bytes_to_workers,
                "from_workers": self.bytes_from_workers,
                "between_ranks": self.bytes_between_ranks,
            },
            "bytes_weights": self.bytes_weights,
            "controls": {
                "parallel": self.controls_parallel,
                "alone": dict(self.controls_alone),
                "last_s": dict(self.control_seconds),
            },
            "decodes": {
                "parallel": self.decodes_parallel,
                "alone": dict(self.decodes_alone),
                "last_s": self.decode_seconds,
            },
            "loads": self.loads,
            "residency": list(self.residency),
            "gave_way": self.gave_way,
            "weights_verified": self.weights_verified,
            "last_step_s": {
                "host": self.host_step_seconds,
                "ranks": dict(self.step_seconds),
                "busy": dict(self.busy_seconds),
            },
            "balance": {"weights": list(self.weights), "changes": self.share_changes},
            "last_loss_unix_s": self.last_loss_unix_s,
            "last_run": None
            if last is None
            else {name: getattr(last, name) for name in RunReport.__slots__},
            "last_error": self.last_error,
        }
