"""One line for each reason, one line for each run."""

from __future__ import annotations

import logging

import pytest

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.report.log import (
    begin_prompt,
    note_once,
    say_unheard,
    summary,
    warn_once,
)
from comfy_xdit_patch.report.status import RunCounts


def test_a_reason_is_said_once_however_often_it_occurs(caplog):
    for reason in ("first reason of a test", "second reason of a test") * 3:
        warn_once(reason)
    assert [record.getMessage() for record in caplog.records] == [
        "xDiT: running on one GPU as ComfyUI does: first reason of a test.",
        "xDiT: running on one GPU as ComfyUI does: second reason of a test.",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_the_next_prompt_says_its_reasons_too(caplog):
    """It may be of another model; many sampling runs of one prompt say a reason once."""
    caplog.set_level(logging.INFO, logger="comfy_xdit_patch")
    for _ in range(2):
        begin_prompt()
        for _ in range(3):
            warn_once("a reason of a prompt")
            note_once("a note of a prompt")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] * 2


def measured(num_parallel, num_measured, one_seconds):
    made = counts(num_parallel)
    made.measured, made.one_seconds = num_measured, one_seconds
    return made


def counts(num_parallel, **fall_backs):
    made = RunCounts(plan=ParallelPlan(ulysses=4), parallel_seconds=[0.061] * num_parallel)
    made.fall_backs.update({reason.replace("_", " "): n for reason, n in fall_backs.items()})
    return made


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (counts(20), "xDiT: 20 steps on 4 GPUs (ulysses=4), 0 fell back, 61 ms/step"),
        (
            counts(18, a_worker_was_lost=2),
            "xDiT: 18 steps on 4 GPUs (ulysses=4), 2 fell back, 61 ms/step (a worker was lost)",
        ),
        (
            measured(17, 3, 0.122),
            "xDiT: 17 steps on 4 GPUs (ulysses=4), 0 fell back, 61 ms/step, "
            "2.00x of ComfyUI alone as measured here, 3 in ComfyUI alone to compare",
        ),
        (
            RunCounts(chose_one=20),
            "xDiT: 20 steps on one GPU (the faster, as measured)",
        ),
        (
            RunCounts(plan=ParallelPlan(ulysses=4), parallel_seconds=[0.061] * 6, chose_one=4),
            "xDiT: 6 steps on 4 GPUs (ulysses=4), 0 fell back, 61 ms/step, "
            "4 on one GPU, the faster as measured",
        ),
        (measured(0, 1, None), "xDiT: 1 steps on one GPU (to compare)"),
        (
            RunCounts(
                plan=ParallelPlan(ulysses=2, pipefusion=2),
                parallel_seconds=[0.061] * 20,
                warm_ups=1,
            ),
            "xDiT: 20 steps on 4 GPUs (pipefusion=2,ulysses=2, approximate), 0 fell back, "
            "61 ms/step, 1 exact as warm-up",
        ),
        (
            RunCounts(
                plan=ParallelPlan(ulysses=4),
                transfer_dtype="int8",
                parallel_seconds=[0.061] * 20,
            ),
            "xDiT: 20 steps on 4 GPUs (ulysses=4, transfers in int8, approximate), 0 fell back, "
            "61 ms/step",
        ),
        (
            counts(0, a_ControlNet_is_active=15, gradients_are_wanted=5),
            "xDiT: 20 steps on one GPU (a ControlNet is active; gradients are wanted)",
        ),
    ],
)
def test_a_run_is_summed_up_in_one_line(run, line):
    assert summary(run.report(ranks=4), device_word="GPUs") == line


@pytest.fixture(params=["disable", "root level", "logger level", "handlers"])
def muted(request, monkeypatch, caplog):
    """Mute logging as packs do, and undo it by calling the fixture."""
    log = logging.getLogger("comfy_xdit_patch")
    if request.param == "disable":
        logging.disable(logging.CRITICAL)
        undo = lambda: logging.disable(logging.NOTSET)  # noqa: E731
    elif request.param == "handlers":
        handlers = [(handler, handler.level) for handler in logging.getLogger().handlers]
        for handler, _ in handlers:
            handler.setLevel(logging.CRITICAL + 1)
        undo = lambda: [handler.setLevel(level) for handler, level in handlers]  # noqa: E731
    else:
        logger = logging.getLogger() if request.param == "root level" else log
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        undo = lambda: logger.setLevel(level)  # noqa: E731
    yield undo
    undo()


def test_what_nobody_could_hear_is_said_later_and_once(muted, caplog, request):
    reason = f"a reason of {request.node.name}"
    for _ in range(2):
        warn_once(reason)
    assert caplog.records == []
    say_unheard()
    assert caplog.records == [], "nor could it be heard now"
    muted()
    for _ in range(2):
        say_unheard()
        warn_once(reason)
    (record,) = caplog.records
    assert record.getMessage() == f"xDiT: running on one GPU as ComfyUI does: {reason}."
