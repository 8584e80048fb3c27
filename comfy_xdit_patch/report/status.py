"""Counts of what was computed, for people: every figure was counted or measured.

Runs in: host process.

A *step* here is one call of the diffusion model, which is what the ranks compute together; some
samplers make two in a denoising step.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.transfers import TransferDtype
from comfy_xdit_patch.report.schema import Counts, LastError, Reason, RunReport, Start
from comfy_xdit_patch.report.troubleshooting import remedy_of


@dataclass(slots=True)
class RunCounts:
    """Counts of a run that is going on."""

    plan: ParallelPlan | None = None
    transfer_dtype: TransferDtype = "exact"
    """In which form heads travelled; approximate if they did so in any step."""
    parallel_seconds: list[float] = field(default_factory=list)
    fall_backs: Counter[str] = field(default_factory=Counter)
    gathered: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    measured: int = 0
    chose_one: int = 0
    """Steps that ComfyUI computed because ``auto`` had found it to be faster."""
    one_seconds: float | None = None
    """What ``auto`` once measured for a step of this kind in ComfyUI alone."""
    warm_ups: int = 0

    def add(self, other: RunCounts) -> None:
        """Count another run's steps too."""
        self.plan = other.plan or self.plan
        if other.transfer_dtype != "exact":
            self.transfer_dtype = other.transfer_dtype
        self.parallel_seconds += other.parallel_seconds
        self.fall_backs += other.fall_backs
        self.gathered += other.gathered
        self.skipped += other.skipped
        self.measured += other.measured
        self.chose_one += other.chose_one
        self.one_seconds = other.one_seconds or self.one_seconds
        self.warm_ups += other.warm_ups

    def report(self, *, ranks: int) -> RunReport:
        parallel = len(self.parallel_seconds)
        fell_back = sum(self.fall_backs.values())
        median = statistics.median(self.parallel_seconds) if parallel else None
        return RunReport(
            steps=parallel + fell_back + self.chose_one + self.skipped + self.measured,
            steps_parallel=parallel,
            steps_fell_back=fell_back,
            steps_chose_one_gpu=self.chose_one,
            steps_gathered=sum(self.gathered.values()),
            steps_skipped=self.skipped,
            steps_measured=self.measured,
            gather_reasons=dict(self.gathered),
            fall_back_reasons=dict(self.fall_backs),
            ms_per_step=None if median is None else median * 1000,
            speedup=self.one_seconds / median if self.one_seconds and median else None,
            strategy=self.plan.strategy if parallel and self.plan else None,
            plan=self.plan.name if self.plan else None,
            is_exact=self.plan is None or (self.plan.is_exact and self.transfer_dtype == "exact"),
            transfer_dtype=self.transfer_dtype,
            steps_warm_up=self.warm_ups,
            ranks=ranks if parallel else 1,
        )


WINDOW_S = 10.0
"""Over which the busy share of a rank is taken."""


@dataclass(slots=True)
class RankCounts:
    """What one rank did, whichever processes it had."""

    num_forwards: int = 0
    """Of the process that answered last."""
    busy_total_s: float = 0.0
    """What it computed since ComfyUI started, without what it waited for others."""
    load_seconds: float | None = None
    step_seconds: float | None = None
    """What it needed for the last step, from the message to the written result."""
    busy_seconds: float | None = None
    """What it computed in the last step, without what it waited for others."""
    launch_bound: bool | None = None
    """Whether its CPU, and not its GPU, set the pace of the last step."""
    control_seconds: float | None = None
    """What it needed for the last call of a ControlNet."""
    blocks_compiled: int = 0
    """How many blocks it ran compiled in the last step."""
    graphs: int = 0
    """What it has compiled so far."""
    replays: int = 0
    """How many of its steps were a CUDA graph."""
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    """When it was done, on the monotonic clock, and how long it was busy with that."""

    def busy(self, seconds: float) -> None:
        """Note what it computed until now."""
        now_s = time.monotonic()
        self.busy_total_s += seconds
        self.recent.append((now_s, seconds))
        while self.recent[0][0] < now_s - WINDOW_S:
            self.recent.popleft()

    def busy_share(self, now_s: float) -> float:
        """Part of the last ``WINDOW_S`` in which it computed."""
        busy = sum(busy for then, busy in tuple(self.recent) if then >= now_s - WINDOW_S)
        return min(1.0, busy / WINDOW_S)


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
    steps_chose_one: int = 0
    """Steps that ComfyUI computed because ``auto`` had found it to be faster."""
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
    losses: int = 0
    """How often a step was handed back to ComfyUI because a worker was lost."""
    weights_verified: int = 0
    """Weights compared bit for bit with ComfyUI's own, counted for each rank."""
    controls_parallel: int = 0
    """Calls of a ControlNet that the ranks computed together."""
    controls_alone: Counter[str] = field(default_factory=Counter)
    """Calls of a ControlNet that ComfyUI computed, by reason, in steps that are parallel."""
    decodes_parallel: int = 0
    """Latents that the ranks decoded together."""
    decodes_alone: Counter[str] = field(default_factory=Counter)
    """Latents large enough that ComfyUI decoded while ranks were there, by reason."""
    decode_seconds: float | None = None
    """What the last decoding on the ranks took, in the host."""
    ranks: defaultdict[int, RankCounts] = field(default_factory=lambda: defaultdict(RankCounts))
    residency: list[str] = field(default_factory=list)
    """The arithmetic that decided where the weights of the last step lie."""
    planned_bytes: int | None = None
    """What that plan counts on the tightest card, beside the contexts."""
    weights: tuple[int, ...] = ()
    """Relative speed of the ranks, by which work is shared; none while shares are even."""
    share_changes: int = 0
    """How often the weights changed."""
    host_step_seconds: float | None = None
    """What the last step took in the host. The difference is transport and wake-up."""
    last_plan: ParallelPlan | None = None
    """How the last parallel step was shared."""
    last_loss_unix_s: float | None = None
    """When a worker was last lost and its step handed back to ComfyUI."""
    last_run: RunReport | None = None
    last_error: LastError | None = None
    load_since_s: float | None = None
    """When the load that goes on began, on the monotonic clock."""

    def failed(self, text: str) -> None:
        """Note the last thing that went wrong."""
        self.last_error = LastError(text, time.time())

    def lost(self, text: str) -> None:
        """Note that a step was handed back because a worker was lost."""
        self.failed(text)
        self.losses += 1
        self.last_loss_unix_s = time.time()

    def ran(
        self,
        rank: int,
        *,
        num_forwards: int,
        step_s: float,
        busy_s: float,
        of_call_s: float | None = None,
        is_launch_bound: bool | None = None,
        blocks_compiled: int = 0,
        graphs: int = 0,
        is_replayed: bool = False,
    ) -> None:
        """Note a rank's answer.

        Args:
            busy_s: what it computed since its last answer.
            of_call_s: what it computed in the call so far, if that is more.
            is_launch_bound: not known of single blocks.
            graphs: how many were compiled in this step.
            is_replayed: whether the step was a CUDA graph.
        """
        counts = self.ranks[rank]
        counts.busy(busy_s)
        counts.num_forwards, counts.step_seconds = num_forwards, step_s
        counts.busy_seconds = busy_s if of_call_s is None else of_call_s
        counts.launch_bound = is_launch_bound
        counts.blocks_compiled = blocks_compiled
        counts.graphs += graphs
        counts.replays += is_replayed

    def controlled(self, rank: int, seconds: float) -> None:
        """Note what a rank needed for a call of a ControlNet."""
        self.ranks[rank].control_seconds = seconds

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Mark a load of a model."""
        self.load_since_s = time.monotonic()
        try:
            yield
        finally:
            self.load_since_s = None

    def loaded(self, rank: int, seconds: float) -> None:
        """Note what a rank needed to read a model."""
        self.ranks[rank].load_seconds = round(seconds, 3)

    def begin_anew(self) -> Totals:
        """Forget what was last: other settings hold from now on. What is counted goes on."""
        self.residency, self.planned_bytes, self.weights = [], None, ()
        self.host_step_seconds = self.decode_seconds = self.last_plan = self.last_run = None
        self.last_error = self.last_loss_unix_s = None
        for counts in self.ranks.values():
            counts.num_forwards, counts.load_seconds, counts.step_seconds = 0, None, None
            counts.busy_seconds = counts.launch_bound = counts.control_seconds = None
        return self

    def counts(self) -> Counts:
        """Everything that only goes up."""
        return Counts(
            runs=self.runs,
            steps_parallel=self.steps_parallel,
            steps_fell_back=sum(self.fall_backs.values()),
            steps_chose_one_gpu=self.steps_chose_one,
            steps_measured=self.steps_measured,
            steps_skipped=self.steps_skipped,
            steps_gathered=self.steps_gathered,
            controls_parallel=self.controls_parallel,
            controls_alone=sum(self.controls_alone.values()),
            decodes_parallel=self.decodes_parallel,
            decodes_alone=sum(self.decodes_alone.values()),
            loads=self.loads,
            gave_way=self.gave_way,
            losses=self.losses,
            weights_verified=self.weights_verified,
            share_changes=self.share_changes,
            bytes_to_workers=self.bytes_to_workers,
            bytes_from_workers=self.bytes_from_workers,
            bytes_between_ranks=self.bytes_between_ranks,
            bytes_weights=self.bytes_weights,
        )

    def of_status(self) -> dict[str, Any]:
        """The fields of ``Status`` that are counts, and what was last."""
        since_s = self.load_since_s
        loading = None if since_s is None else Start("loading", time.monotonic() - since_s)
        return {
            "start": loading,
            "residency": list(self.residency),
            "weights": list(self.weights),
            "totals": self.counts(),
            "fell_back": reasons(self.fall_backs),
            "controls_alone": reasons(self.controls_alone),
            "decodes_alone": reasons(self.decodes_alone),
            "last_run": self.last_run,
            "last_step_s": self.host_step_seconds,
            "last_decode_s": self.decode_seconds,
            "last_loss_unix_s": self.last_loss_unix_s,
            "last_error": self.last_error,
        }

    def plan_of_last_step(self) -> ParallelPlan | None:
        """How the last parallel step was shared; None under these settings yet."""
        return self.last_plan

    def planned(self) -> int | None:
        """What the plan of the last model counts on the tightest card; None where none limits."""
        return self.planned_bytes

    def of_rank(self, rank: int, now_s: float, since_s: float | None) -> dict[str, Any]:
        """The fields of ``RankStatus`` that are counts.

        Args:
            now_s: on the monotonic clock.
            since_s: when its process joined; None if there is none.
        """
        counts = self.ranks[rank]
        is_before = since_s is not None and not (counts.recent and counts.recent[-1][0] >= since_s)
        return {
            "forwards": 0 if is_before else counts.num_forwards,
            "load_s": counts.load_seconds,
            "step_s": counts.step_seconds,
            "busy_s": counts.busy_seconds,
            "busy_total_s": counts.busy_total_s,
            "busy_share": counts.busy_share(now_s),
            "control_s": counts.control_seconds,
            "is_launch_bound": counts.launch_bound,
            "blocks_compiled": counts.blocks_compiled,
            "graphs": counts.graphs,
            "replays": counts.replays,
        }


def reasons(counted: Counter[str]) -> list[Reason]:
    """Each reason with its count and its remedy."""
    return [Reason(reason, count, remedy_of(reason)) for reason, count in tuple(counted.items())]
