"""A text that the program said finds its row on the page, and so its remedy."""

from __future__ import annotations

import time

import pytest

from comfy_xdit_patch.report.troubleshooting import remedy_of, row_of

FAILED = "Rank 1 (cpu) failed in import of ComfyUI: RuntimeError: x\nTraceback from rank 1:\n  line"
KILLED = (
    "Rank 0 (pid 7, NVIDIA L40S) was killed by signal 9 while idle. "
    "Last lines of /tmp/a b/worker-0.log:\n    joined 2 ranks"
)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("a worker was lost", "a worker was lost"),
        (
            "a node put Wrapped of pack.py around the whole model",
            "a node put <class> around the whole model",
        ),
        (
            FAILED,
            "Rank <rank> (<device>) failed in <phase>: <error> "
            "Traceback from rank <rank>: <traceback>",
        ),
        (KILLED, "Rank <rank> (pid <pid>, <device>) <how> <when>. Last lines of <log>: <lines>"),
        (
            'XDIT_GPUS="seven" is not legal. Legal: all, or 0 to switch off.',
            '<variable>="<value>" is not legal. Legal: <values>.',
        ),
    ],
)
def test_values_may_be_anything(text, entry):
    assert entry in row_of(text).entries


def test_a_text_that_ends_with_its_cause_has_the_causes_row():
    assert row_of(f"The workers did not start. {FAILED}") is row_of(FAILED)
    assert "<cause>" in row_of("The workers did not start. Nobody knows why.").entries[0]


@pytest.mark.parametrize("text", ["", "a worker was", "a worker was lost.", "nobody says this"])
def test_another_text_has_none(text):
    assert row_of(text) is None
    assert remedy_of(text) is None


def test_a_long_traceback_is_looked_up_at_once():
    begin = time.perf_counter()
    assert row_of("Rank 1 (pid 2, cpu) (pid 3, cpu) " + "x, (y) z. " * 5000) is None
    assert time.perf_counter() - begin < 0.5
