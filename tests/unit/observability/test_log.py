"""One line for each reason, one line for each run."""

from __future__ import annotations

import logging

import pytest

from comfy_xdit_patch.observability.log import summary, warn_once
from comfy_xdit_patch.observability.status import RunCounts
from comfy_xdit_patch.planning.plan import ParallelPlan


def test_a_reason_is_said_once_however_often_it_occurs(caplog):
    for reason in ("first reason of a test", "second reason of a test") * 3:
        warn_once(reason)
    assert [record.getMessage() for record in caplog.records] == [
        "xDiT: running on one GPU as ComfyUI does: first reason of a test.",
        "xDiT: running on one GPU as ComfyUI does: second reason of a test.",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def measured(num_parallel, num_measured, one_seconds):
    made = counts(num_parallel)
    made.measured, made.one_seconds = num_measured, one_seconds
    return made


def counts(num_parallel, **fall_backs):
    made = RunCounts(plan=ParallelPlan(4, 1, 4), parallel_seconds=[0.061] * num_parallel)
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
        (measured(0, 1, None), "xDiT: 1 steps on one GPU (to compare)"),
        (
            counts(0, a_ControlNet_is_active=15, gradients_are_wanted=5),
            "xDiT: 20 steps on one GPU (a ControlNet is active; gradients are wanted)",
        ),
    ],
)
def test_a_run_is_summed_up_in_one_line(run, line):
    assert summary(run.report(ranks=4), device_word="GPUs") == line
