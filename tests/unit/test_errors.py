"""Exceptions are raised on purpose; a refusal is a value."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from comfy_xdit_patch import errors
from comfy_xdit_patch.errors import Refusal, Scope, XditError

EXCEPTIONS = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, BaseException) and cls is not XditError
]


@pytest.mark.parametrize("cls", EXCEPTIONS)
def test_every_exception_has_one_root_and_keeps_its_text(cls):
    assert issubclass(cls, XditError)
    assert str(cls("rank 2 is gone")) == "rank 2 is gone"
    assert cls.__name__.endswith("Error")


def test_no_exception_of_ours_passes_for_a_system_exit_or_an_interrupt():
    assert issubclass(XditError, Exception)


def test_a_refusal_is_a_value_that_lasts_for_the_run_unless_said_otherwise():
    refusal = Refusal("no")
    assert not isinstance(refusal, BaseException)
    assert refusal.scope is Scope.RUN
    assert refusal == Refusal("no") != Refusal("no", Scope.STEP)
    with pytest.raises(dataclasses.FrozenInstanceError):
        refusal.reason = "yes"  # type: ignore[misc]


def test_a_refusal_is_true_so_that_checks_can_be_chained_with_or():
    assert Refusal("")
