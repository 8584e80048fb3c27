"""Several ranks or one: the order of measurements, and what follows from them."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.planning.plan import Workload
from comfy_xdit_patch.planning.verdict import (
    NUM_TIMED,
    NUM_WATCHED,
    Trial,
    Verdict,
    Way,
    size_class,
)


def tried(several: list[float], one: list[float]) -> Trial:
    trial = Trial("ulysses=2")
    for seconds in several:
        assert trial.way() is Way.SEVERAL
        trial.took(seconds, is_several=True)
    for seconds in one:
        assert trial.way() is Way.ONE
        trial.took(seconds, is_several=False)
    return trial


def test_both_are_timed_and_the_first_step_of_each_does_not_count():
    trial = tried([9.0, 1.0, 1.2], [9.0, 2.0, 2.5])
    assert trial.verdict == Verdict("ulysses=2", 1.0, 2.0)
    assert trial.verdict.speedup == 2.0
    assert trial.way() is Way.SEVERAL


def in_doubt(several: list[float]) -> Trial:
    """One was faster at first; these are the ranks' further steps."""
    trial = tried([9.0, 2.0, 2.0], [9.0, 2.0, 2.0])
    for seconds in several:
        assert trial.verdict is None
        assert trial.way() is Way.SEVERAL
        trial.took(seconds, is_several=True)
    return trial


@pytest.mark.parametrize(("several", "way"), [(1.9, Way.SEVERAL), (2.0, Way.NOT_SEVERAL)])
def test_the_faster_is_taken_and_of_equals_one(several, way):
    assert in_doubt([3.0, several]).way() is way


def test_a_disturbance_of_the_first_steps_does_not_decide():
    assert in_doubt([1.5]).verdict == Verdict("ulysses=2", 1.5, 2.0)
    assert in_doubt([2.5, 2.2]).verdict == Verdict("ulysses=2", 2.0, 2.0)


def test_there_is_no_verdict_before_both_were_timed():
    trial = tried([9.0, 1.0, 1.0], [9.0, 2.0])
    assert trial.verdict is None
    assert trial.way() is Way.ONE
    assert len(trial.several) == len(trial.one) + 1 == NUM_TIMED + 1


def test_it_is_measured_again_when_the_ranks_become_slower_than_one_was():
    trial = tried([9.0, 1.0, 1.0], [9.0, 2.0, 2.0])
    for _ in range(NUM_WATCHED - 1):
        trial.took(2.1, is_several=True)
    assert trial.way() is Way.SEVERAL
    trial.took(2.1, is_several=True)
    assert trial.way() is Way.ONE
    for seconds in (9.0, 2.0, 2.0):
        assert trial.took(seconds, is_several=False) is None
    assert trial.took(2.5, is_several=True) is None
    verdict = trial.took(2.5, is_several=True)
    assert verdict == Verdict("ulysses=2", 2.1, 2.0)
    assert trial.way() is Way.NOT_SEVERAL


def test_a_few_slow_steps_change_nothing():
    trial = tried([9.0, 1.0, 1.0], [9.0, 2.0, 2.0])
    for seconds in (5.0, 1.0, 5.0, 1.0, 1.0) * 3:
        trial.took(seconds, is_several=True)
        assert trial.way() is Way.SEVERAL


def workload(**changes):
    sizes = {"batch_size": 1, "num_text_tokens": 256, "num_image_tokens": 4096, "num_heads": 24}
    return Workload(**{**sizes, **changes})


def test_calls_of_about_a_size_are_one_kind():
    base = size_class(workload())
    assert base == "1 x 2^12 tokens"
    assert size_class(workload(num_text_tokens=300)) == base
    assert size_class(workload(num_image_tokens=8192)) != base
    assert size_class(workload(num_reference_tokens=4096)) != base
    assert size_class(workload(batch_size=2)) != base
