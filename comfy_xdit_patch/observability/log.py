"""One line for each reason, one line for each run.

Runs in: host process.
"""

from __future__ import annotations

import logging

from comfy_xdit_patch.observability.status import RunReport

log = logging.getLogger("comfy_xdit_patch")
_said: set[str] = set()


def warn_once(reason: str) -> None:
    """Say why steps run on one GPU, once for each reason."""
    if reason not in _said:
        _said.add(reason)
        log.warning("xDiT: running on one GPU as ComfyUI does: %s.", reason)


def note_once(text: str) -> None:
    """Say something that takes no step out of the parallel path, once."""
    if text not in _said:
        _said.add(text)
        log.info("xDiT: %s.", text)


def summary(run: RunReport, *, device_word: str) -> str:
    """The line for a finished sampling run."""
    if not run.steps_parallel:
        reasons = "; ".join(run.fall_back_reasons) or "to compare"
        return f"xDiT: {run.steps} steps on one GPU ({reasons})"
    text = (
        f"xDiT: {run.steps_parallel} steps on {run.ranks} {device_word} ({run.plan}), "
        f"{run.steps_fell_back} fell back, {run.ms_per_step:.0f} ms/step"
    )
    if run.speedup is not None:
        text += f", {run.speedup:.2f}x of ComfyUI alone as measured here"
    if run.steps_measured:
        text += f", {run.steps_measured} in ComfyUI alone to compare"
    if run.gather_reasons:
        text += f", {run.steps_gathered} with gathers ({'; '.join(run.gather_reasons)})"
    if run.steps_skipped:
        text += f", {run.steps_skipped} without blocks"
    if run.fall_back_reasons:
        text += f" ({'; '.join(run.fall_back_reasons)})"
    return text
