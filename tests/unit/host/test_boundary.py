"""Our faults are logged and end here; interrupts and wanted errors pass."""

from __future__ import annotations

import itertools
import logging

import pytest

from comfy_xdit_patch.errors import FallBackError, WorkerError
from comfy_xdit_patch.host.boundary import attempt, our_faults_stay_ours, theirs
from comfy_xdit_patch.report.log import begin_prompt

_numbers = itertools.count()


@pytest.fixture
def where():
    """Return a place that no other test has named: each is reported once in a prompt."""
    return f"place {next(_numbers)}"


@pytest.mark.parametrize("error", [ValueError("planted"), WorkerError("planted"), KeyError(1)])
def test_a_fault_of_ours_is_logged_with_its_traceback_and_goes_no_further(
    interrupt, where, caplog, error
):
    with our_faults_stay_ours(where):
        raise error
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert where in record.getMessage()
    assert record.exc_info[1] is error


def test_the_same_fault_at_the_same_place_is_logged_once(interrupt, where, caplog):
    for error in (ValueError(1), ValueError(2), TypeError(3), ValueError(4)):
        with our_faults_stay_ours(where):
            raise error
    assert [type(record.exc_info[1]) for record in caplog.records] == [ValueError, TypeError]


def test_a_fault_is_logged_again_in_the_next_prompt(interrupt, where, caplog):
    for _ in range(2):
        begin_prompt()
        for _ in range(2):
            with our_faults_stay_ours(where):
                raise ValueError("planted")
    assert len(caplog.records) == 2


def test_the_users_interrupt_passes(interrupt, where, caplog):
    with pytest.raises(interrupt), our_faults_stay_ours(where):
        raise interrupt
    assert caplog.records == []


@pytest.mark.parametrize("error", [FallBackError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_these_exceptions_are_no_faults_of_ours_and_pass(interrupt, where, error):
    with pytest.raises(error), our_faults_stay_ours(where):
        raise error


def test_a_fault_passes_when_the_user_asked_for_errors(interrupt, where):
    with pytest.raises(ValueError, match="planted"), our_faults_stay_ours(where, strict=True):
        raise ValueError("planted")


def test_without_a_fault_nothing_is_logged(interrupt, where, caplog):
    done = []
    with our_faults_stay_ours(where):
        done.append(1)
    assert done == [1]
    assert caplog.records == []


def raising(error):
    def call():
        raise error

    return call


def test_what_a_nodes_code_raises_comes_out_of_an_attempt_unchanged(interrupt, caplog):
    error = KeyError("sigmas")
    with pytest.raises(KeyError) as caught:
        attempt(theirs(raising(error)))
    assert caught.value is error
    assert (error.__cause__, error.__context__) == (None, None), "nobody seems to have caught it"
    assert caplog.records == []


def test_a_fault_of_ours_is_kept_and_not_said(interrupt, caplog):
    fault = ValueError("planted")
    assert attempt(raising(fault)) == (None, fault)
    assert attempt(lambda: "out") == ("out", None)
    assert attempt(theirs(lambda: "out")) == ("out", None)
    assert caplog.records == []


def test_interrupts_and_wanted_errors_pass_an_attempt(interrupt):
    for call in (raising(interrupt()), theirs(raising(interrupt()))):
        with pytest.raises(interrupt):
            attempt(call)
    with pytest.raises(FallBackError):
        attempt(raising(FallBackError("no")))
