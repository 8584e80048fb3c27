"""One line for a prompt, and what became of every step in it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.pace.auto import ONE_IS_FASTER
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.outcome import Books, Computed
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.report.status import Totals


@pytest.fixture
def books(caplog):
    caplog.set_level(logging.INFO)
    pool = SimpleNamespace(
        world_size=2, device_word="GPUs", run_succeeded=lambda: None, used=lambda: None
    )
    return Books(Totals(), pool=pool, auto=None, is_strict=False)


def close(books, steps, *, ulysses=2, refusals=()):
    run = Run()
    run.counts.plan = ParallelPlan(batch=2 // ulysses, ulysses=ulysses)
    run.counts.parallel_seconds = [0.05] * steps
    for reason in refusals:
        books.refuse(Refusal(reason, Scope.STEP), run)
    books.close(run)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


def test_tiles_of_a_prompt_have_one_line(books, caplog):
    books.begin_prompt()
    for number in range(17):
        close(books, 3, refusals=["a reason of tiles"] * (number == 4))
    assert lines(caplog) == []
    books.end_prompt()
    assert lines(caplog) == [
        "xDiT: 51 steps of 17 sampling runs on 2 GPUs (ulysses=2), 1 fell back, 50 ms/step "
        "(a reason of tiles)"
    ]


def test_runs_of_other_plans_have_lines_of_their_own(books, caplog):
    books.begin_prompt()
    close(books, 4)
    close(books, 2, ulysses=1)
    close(books, 4)
    books.end_prompt()
    assert [line.split(", ")[0] for line in lines(caplog)] == [
        "xDiT: 8 steps of 2 sampling runs on 2 GPUs (ulysses=2)",
        "xDiT: 2 steps on 2 GPUs (batch=2)",
    ]


def test_a_run_outside_of_a_prompt_has_its_line_at_once(books, caplog):
    close(books, 4)
    books.begin_prompt()
    books.end_prompt()
    assert lines(caplog) == ["xDiT: 4 steps on 2 GPUs (ulysses=2), 0 fell back, 50 ms/step"]


def test_a_step_that_auto_gave_to_one_gpu_did_not_fall_back(books, caplog):
    run = Run()
    books.refuse(ONE_IS_FASTER, run)
    books.refuse(run.refusal, run)  # as the rest of the run is
    books.close(run)
    assert lines(caplog) == ["xDiT: 2 steps on one GPU (the faster, as measured)"]
    assert (run.counts.chose_one, run.counts.fall_backs) == (2, {})


@pytest.mark.parametrize(
    ("request_number", "timed", "whose"),
    [(8, 8, "this"), (8, 7, "last"), (8, 0, None), (8, 6, None), (0, 0, "this")],
    ids=["a CPU's", "a GPU's", "a GPU's first", "somebody else's", "single blocks'"],
)
def test_times_are_of_the_call_that_they_were_taken_of(request_number, timed, whose):
    computed = Computed(torch.ones(1), (0.1,), True, request=request_number, timed=timed)
    assert computed.timed_of("this", (7, "last")) == whose
    assert Computed(torch.ones(1), (0.1,), True, request=1).timed_of("this", (0, "blocks")) is None
