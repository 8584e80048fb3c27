"""Functions that are carried by where they are written, and those that are not."""

from __future__ import annotations

import json
import sys
import types

import pytest

from comfy_xdit_patch.transport.functions import decode_callable, encode_callable
from comfy_xdit_patch.transport.values import UncarriedValueError

SOURCE = """
import functools


def helper(x):
    return x * 2


def wrapping(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) + 1

    return wrapper


class Node:
    def patch(self, scale, more):
        def inner(x, times=3):
            return more(x) * scale * times

        return inner

    @classmethod
    def wrapped(cls, scale):
        @wrapping
        def inner(x):
            return x * scale

        return inner

    def two_of_one_name(self, first):
        if first:

            def inner(x):
                return x
        else:

            def inner(x):
                return -x

        return inner
"""


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A module as another process would import it again."""
    (tmp_path / "some_nodes.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import some_nodes

    yield some_nodes
    del sys.modules["some_nodes"]


def numbers(_):
    raise AssertionError("nothing here keeps state")


def carried(function):
    tree = json.loads(json.dumps(encode_callable(function, numbers)))
    return decode_callable(tree, numbers)


def test_a_function_of_a_module_is_carried_by_name(pack):
    assert carried(pack.helper) is pack.helper


def test_a_closure_is_made_again_with_its_values_and_defaults(pack):
    made = carried(pack.Node().patch(0.5, pack.helper))
    assert made(7) == 7 * 2 * 0.5 * 3
    assert made(7, times=1) == 7


def test_a_wrapped_closure_keeps_its_wrapper(pack):
    made = carried(pack.Node.wrapped(5))
    assert made(2) == 11
    assert made.__wrapped__(2) == 10


def test_two_functions_of_one_name_in_one_method_are_not_guessed_at(pack):
    with pytest.raises(UncarriedValueError, match="not found again"):
        encode_callable(pack.Node().two_of_one_name(True), numbers)


def test_a_closure_over_an_object_is_not_carried(pack):
    with pytest.raises(UncarriedValueError, match="a object"):
        encode_callable(pack.Node().patch(object(), pack.helper), numbers)


def test_a_bound_method_and_a_callable_object_are_not_carried(pack):
    for value in (pack.Node().patch, types.SimpleNamespace()):
        with pytest.raises(UncarriedValueError):
            encode_callable(value, numbers)


def test_another_source_is_not_run(pack):
    tree = encode_callable(pack.Node().patch(2, pack.helper), numbers)
    tree["$function"]["digest"] = "0" * 64
    with pytest.raises(UncarriedValueError, match="another one"):
        decode_callable(tree, numbers)
