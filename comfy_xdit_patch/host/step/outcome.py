"""What became of one call: its result, or why there is none; counted, and said once.

Runs in: host process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from comfy_xdit_patch.errors import (
    AroundBlocksError,
    CallRaisedError,
    CardsFullError,
    DeclinedError,
    FallBackError,
    PlanError,
    Refusal,
    Scope,
    WorkerError,
)
from comfy_xdit_patch.host.pace.auto import ONE_IS_FASTER, Auto, Kind
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.weights.holding import LOST, STARTING
from comfy_xdit_patch.report.log import say, say_unheard, summary, warn_once
from comfy_xdit_patch.report.status import RunCounts, Totals
from comfy_xdit_patch.wire.messages.answers import check_shape
from comfy_xdit_patch.wire.messages.replies import Declined, Done, Reply, short
from comfy_xdit_patch.wire.slot import Slot
from comfy_xdit_patch.wire.values import UncarriedValueError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Computed:
    """A model's output, on the device of ``x`` and in a tensor of its own, and what it took."""

    out: torch.Tensor
    busy_s: tuple[float, ...]
    """What each rank computed in the call ``timed``, without what it waited for others."""
    is_finite: bool
    """Whether there is neither NaN nor infinity in ``out``."""
    is_launch_bound: bool = False
    """Whether a rank's CPU, and not its GPU, set its pace there. Not known of single blocks."""
    request: int = 0
    """0 for single blocks."""
    timed: int = 0
    is_empty: bool = False
    """Whether no block ran on the workers."""
    is_in_making: bool = False
    """Whether a rank compiled or captured something meanwhile: then its time tells nothing."""
    uncompiled: tuple[str, ...] = ()
    """Why blocks that were to run compiled did not."""
    uncaptured: tuple[str, ...] = ()
    """Why ranks that were to make a CUDA graph of the call did not."""

    def timed_of(self, this: T, last: tuple[int, T]) -> T | None:
        """Which call the times are of: this one, the last one, given by its request, or none."""
        if self.timed == self.request:
            return this
        return last[1] if self.timed and self.timed == last[0] else None


@dataclass(frozen=True, slots=True)
class Step:
    """A call that is computed.

    ``gathered_for`` is why a part of it ran here; ``is_empty`` says that no block ran on the
    workers: a node left them out, or computed them itself. ``is_one``: it ran here, to be timed,
    and nobody looked whether it ``is_finite``.
    """

    out: torch.Tensor
    gathered_for: str | None = None
    is_finite: bool = True
    is_empty: bool = False
    is_one: bool = False
    kind: Kind | None = None
    """Set if the time of the step tells ``auto`` something."""


def checked(step: Step) -> Step | Refusal:
    """Refuse a result that is no image. Whether ComfyUI's own is one, ComfyUI finds out."""
    if not step.is_finite:
        return Refusal("the workers' result has NaN or infinity in it")
    return step


def result_of(
    replies: Sequence[Reply], slot: Slot, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Return what the ranks wrote to a slot.

    Args:
        shape: that a right answer has.

    Raises:
        DeclinedError: they wrote nothing, for a reason.
        MessageError: what they say of it cannot be.
    """
    first = replies[0]
    if isinstance(first, Declined):
        raise DeclinedError(short(first.reason))
    assert isinstance(first, Done)
    check_shape(first, shape)
    return slot.handed_out(getattr(torch, first.dtype), first.shape, device)


def lost(error: WorkerError, totals: Totals) -> Refusal:
    """Note a loss of the workers, and return it as the reason why ComfyUI computes a call."""
    totals.lost(str(error))
    return replace(LOST, error=str(error))


def refusal_of(error: Exception, totals: Totals) -> Refusal | None:
    """Why ComfyUI computes a call in which this was raised; None for what is a fault of ours."""
    if isinstance(error, WorkerError):
        return lost(error, totals)
    if isinstance(error, CallRaisedError):
        totals.failed(str(error))
        return Refusal(
            f"the call raised {error.kind} on the workers", has_raised=True, error=str(error)
        )
    if isinstance(error, AroundBlocksError):
        totals.failed(str(error))
        return Refusal(
            "a node's code failed while its blocks ran on the workers",
            has_raised=True,
            error=str(error),
        )
    if isinstance(error, DeclinedError):
        return Refusal(f"a node's patch cannot run on the workers: {error}")
    if isinstance(error, CardsFullError):
        return Refusal("the cards have no room for this call beside the weights", error=str(error))
    if isinstance(error, PlanError):
        return Refusal("a node left a rank without tokens", Scope.STEP)
    if isinstance(error, UncarriedValueError):
        return Refusal(f"an argument cannot be carried over: {error}", Scope.STEP)
    return None


class Books:
    """The counts of runs, and of all of them together."""

    def __init__(self, totals: Totals, *, pool: Pool, auto: Auto, is_strict: bool) -> None:
        self._totals = totals
        self._pool = pool
        self._auto = auto
        self._is_strict = is_strict
        self._of_prompt: dict[str | None, tuple[RunCounts, int]] | None = None
        """Counts of the prompt that is being executed, and of how many runs, by their plan."""

    def begin_prompt(self) -> None:
        """Say nothing of single runs from now on: a node that samples tiles makes one for each."""
        self._of_prompt = {}

    def end_prompt(self) -> None:
        """Say one line for all runs of a prompt that had the same plan."""
        prompt, self._of_prompt = self._of_prompt or {}, None
        if prompt:
            self._pool.used()
        for counts, num_runs in prompt.values():
            self._say(counts, num_runs)
        say_unheard()

    def refuse(self, refusal: Refusal, run: Run) -> None:
        """Count a step that ComfyUI computes.

        Raises:
            FallBackError: ``XDIT_STRICT=1``.
        """
        if refusal.scope is Scope.RUN:
            run.refusal = refusal
        # Whoever waits for workers has them in a moment, and ControlNets on them.
        run.needs_residuals = run.needs_residuals or refusal is not STARTING
        if refusal is ONE_IS_FASTER:
            run.counts.chose_one += 1
            self._totals.steps_chose_one += 1
        else:
            run.counts.fall_backs[refusal.reason] += 1
            self._totals.fall_backs[refusal.reason] += 1
        if self._is_strict:
            error = refusal.error
            raise FallBackError(
                f"XDIT_STRICT=1, and this step cannot run in parallel: {refusal.reason}."
                f"{f' Last error: {error}' if error else ''}"
            )
        warn_once(refusal.reason)

    def count(self, step: Step, run: Run, seconds: float) -> None:
        """Count a step that we computed, and tell ``auto`` what it took."""
        if step.is_one:
            run.counts.measured += 1
            self._totals.steps_measured += 1
            return
        self._totals.host_step_seconds = seconds
        if step.kind is not None:
            self._auto.took(step.kind, seconds)
            run.counts.one_seconds = step.kind.one_seconds
        if step.is_empty:
            run.counts.skipped += 1
            self._totals.steps_skipped += 1
            return
        run.counts.parallel_seconds.append(seconds)
        self._totals.steps_parallel += 1
        if step.gathered_for is not None:
            run.counts.gathered[step.gathered_for] += 1
            self._totals.steps_gathered += 1

    def close(self, run: Run) -> None:
        """Close those of a run, and see to a line about it if FLUX took part."""
        report = run.counts.report(ranks=self._pool.world_size)
        if not report.steps:
            return
        self._totals.runs += 1
        self._pool.used()  # Also where ComfyUI was faster.
        if report.steps_parallel and LOST.reason not in report.fall_back_reasons:
            self._pool.run_succeeded()
        self._totals.last_run = report
        if self._of_prompt is None:
            self._say(run.counts, 1)
            return
        counts, num_runs = self._of_prompt.get(report.plan, (RunCounts(), 0))
        counts.add(run.counts)
        self._of_prompt[report.plan] = counts, num_runs + 1

    def _say(self, counts: RunCounts, num_runs: int) -> None:
        report = counts.report(ranks=self._pool.world_size)
        say(summary(report, device_word=self._pool.device_word, num_runs=num_runs))
