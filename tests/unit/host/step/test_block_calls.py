"""Whose exception it is that comes out of a forward whose blocks run on the workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from comfy_xdit_patch.errors import AroundBlocksError, TheirError, WorkerError
from comfy_xdit_patch.host.step.block_calls import _computed

pytestmark = pytest.mark.usefixtures("interrupt")


def step(*, error=None, has_given=True):
    return SimpleNamespace(error=error, has_given=has_given)


def raising(error):
    def compute():
        raise error

    return compute


def test_a_forward_that_was_given_nothing_of_ours_raises_its_own():
    error = TypeError("unexpected argument")
    with pytest.raises(TheirError) as caught:
        _computed(raising(error), step(has_given=False))
    assert caught.value.error is error


def test_one_that_was_given_our_tokens_may_have_stumbled_over_them():
    with pytest.raises(AroundBlocksError, match="TypeError: no data pointer"):
        _computed(raising(TypeError("no data pointer")), step())


def test_what_was_raised_in_ours_is_ours():
    lost = WorkerError("lost")
    with pytest.raises(WorkerError):
        _computed(raising(lost), step(error=lost))


def test_a_node_that_goes_on_after_an_exception_of_ours_has_no_result():
    lost = WorkerError("lost")
    with pytest.raises(WorkerError):
        _computed(lambda: "made of something else", step(error=lost))
    with pytest.raises(WorkerError):
        _computed(raising(KeyError("a node's own, because of it")), step(error=lost))
    assert _computed(lambda: "out", step()) == "out"


def test_the_users_interrupt_passes(interrupt):
    with pytest.raises(interrupt):
        _computed(raising(interrupt()), step(has_given=False))
