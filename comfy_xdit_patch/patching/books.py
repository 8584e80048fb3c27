"""Count what became of every step, and say it: one line for each reason and each run.

Runs in: host process.
"""

from __future__ import annotations

import logging

from comfy_xdit_patch.errors import FallBackError, Refusal, Scope
from comfy_xdit_patch.observability.log import summary, warn_once
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.auto import Auto
from comfy_xdit_patch.patching.holding import LOST, STARTING
from comfy_xdit_patch.patching.run import Run
from comfy_xdit_patch.patching.step import Step
from comfy_xdit_patch.workers.pool import Pool

log = logging.getLogger("comfy_xdit_patch")


class Books:
    """The counts of runs, and of all of them together."""

    def __init__(self, totals: Totals, *, pool: Pool, auto: Auto, is_strict: bool) -> None:
        self._totals = totals
        self._pool = pool
        self._auto = auto
        self._is_strict = is_strict

    def refuse(self, refusal: Refusal, run: Run) -> None:
        """Count a step that ComfyUI computes.

        Raises:
            FallBackError: ``XDIT_STRICT=1``.
        """
        if refusal.scope is Scope.RUN:
            run.refusal = refusal
        # Whoever waits for workers has them in a moment, and ControlNets on them.
        run.needs_residuals = run.needs_residuals or refusal is not STARTING
        run.counts.fall_backs[refusal.reason] += 1
        self._totals.fall_backs[refusal.reason] += 1
        if self._is_strict:
            error = self._totals.last_error
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
            self._auto.took(step.kind, seconds, is_several=True)
            verdict = step.kind.trial.verdict
            run.counts.one_seconds = None if verdict is None else verdict.one_s
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
        """Close those of a run, and say one line about it if FLUX took part."""
        report = run.counts.report(ranks=self._pool.world_size)
        if not report.steps:
            return
        self._totals.runs += 1
        if report.steps_parallel and LOST.reason not in report.fall_back_reasons:
            self._pool.run_succeeded()
        self._totals.last_run = report
        log.info("%s", summary(report, device_word=self._pool.device_word))
