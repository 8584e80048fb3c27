"""One line for each reason in a prompt, one line for each prompt.

Runs in: host process.

ComfyUI executes one prompt at a time. What was said of it is kept for the process, as logging is.
It is said again of the next prompt, which may be of another model.

Some nodes mute all logging while they sample. A line that would reach nobody is kept, and said when
logging is on again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from comfy_xdit_patch.report.schema import RunReport

log = logging.getLogger("comfy_xdit_patch")
_said: set[str] = set()
"""Of the prompt that is being executed."""
_unheard: dict[str, Callable[[str], None]] = {}


def begin_prompt() -> None:
    """Let everything be said once more: another prompt begins."""
    _said.clear()


def warn_once(reason: str) -> None:
    """Say why steps run on one GPU, once in a prompt for each reason."""
    if _is_to_be_said(reason, logging.WARNING, warn_once):
        log.warning("xDiT: running on one GPU as ComfyUI does: %s.", reason)


def note_once(text: str) -> None:
    """Say once in a prompt what leaves all steps parallel."""
    if _is_to_be_said(text, logging.INFO, note_once):
        log.info("xDiT: %s.", text)


def say(line: str) -> None:
    """Say a line that tells what became of steps."""
    if is_heard(logging.INFO):
        log.info("%s", line)
    else:
        _unheard[line] = say


def say_unheard() -> None:
    """Say the lines that were kept while logging was mute, if it is on again."""
    waiting = dict(_unheard)
    _unheard.clear()
    for text, speak in waiting.items():
        speak(text)


def is_heard(level: int) -> bool:
    """Whether a line of this level reaches anybody: packs mute loggers, handlers, or all."""
    if log.disabled or not log.isEnabledFor(level):
        return False
    handlers: list[logging.Handler] = []
    logger: logging.Logger | None = log
    while logger is not None:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    if not handlers and logging.lastResort is not None:
        handlers = [logging.lastResort]
    return any(handler.level <= level for handler in handlers)


def is_new(text: str, level: int) -> bool:
    """Whether a text was not said yet in this prompt. It is noted as said if somebody hears it."""
    if text in _said:
        return False
    if is_heard(level):
        _said.add(text)
    return True


def _is_to_be_said(text: str, level: int, speak: Callable[[str], None]) -> bool:
    if not is_new(text, level):
        return False
    if text not in _said:
        _unheard[text] = speak
    return text in _said


def summary(run: RunReport, *, device_word: str, num_runs: int = 1) -> str:
    """The line for a finished sampling run, or for several of one prompt."""
    steps = "steps" if num_runs == 1 else f"steps of {num_runs} sampling runs"
    if not run.steps_parallel:
        chosen = ["the faster, as measured"] if run.steps_chose_one_gpu else []
        reasons = "; ".join([*chosen, *run.fall_back_reasons]) or "to compare"
        return f"xDiT: {run.steps} {steps} on one GPU ({reasons})"
    plan = f"{run.plan}"
    if run.transfer_dtype != "exact":
        plan += f", transfers in {run.transfer_dtype}"
    if not run.is_exact:
        plan += ", approximate"
    text = (
        f"xDiT: {run.steps_parallel} {steps} on {run.ranks} {device_word} ({plan}), "
        f"{run.steps_fell_back} fell back, {run.ms_per_step:.0f} ms/step"
    )
    if run.steps_warm_up:
        text += f", {run.steps_warm_up} exact as warm-up"
    if run.speedup is not None:
        text += f", {run.speedup:.2f}x of ComfyUI alone as measured here"
    if run.steps_chose_one_gpu:
        text += f", {run.steps_chose_one_gpu} on one GPU, the faster as measured"
    if run.steps_measured:
        text += f", {run.steps_measured} in ComfyUI alone to compare"
    if run.gather_reasons:
        text += f", {run.steps_gathered} with gathers ({'; '.join(run.gather_reasons)})"
    if run.steps_skipped:
        text += f", {run.steps_skipped} without blocks"
    if run.fall_back_reasons:
        text += f" ({'; '.join(run.fall_back_reasons)})"
    return text
