"""Functions that are carried by where they are written, and those that are not."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest

from comfy_xdit_patch.wire.functions import decode_callable, encode_callable
from comfy_xdit_patch.wire.values import UncarriedValueError

SOURCE = """
import functools
import math

import torch
from comfy_like import wrap_attn


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

    def uncompiled(self, first):
        return torch.compiler.disable()(self.two_of_one_name(first))

    def holding_itself(self, first):
        kernel = self.uncompiled(first)

        @wrap_attn
        def attention(x, *, scale=3):
            return kernel(x) * scale

        def override(x):
            return attention.__wrapped__(x) + attention(x)

        return override

    def of_every_kind(self, first):
        twice = functools.partial(self.two_of_one_name(first), 2)
        half, double = (lambda x: x / 2), (lambda x: x * 2)
        both = (half, double)
        if first:
            unset = 1

        def inner(x):
            return twice() + both[1](x) + math.floor(x) if x < 9 else unset

        return inner


def decorated(x):
    return x + 1


decorated = wrapping(decorated)


def replaced(x):
    return x + 2


original = replaced


@functools.wraps(replaced)
def replacement(x):
    return x + 100
"""

LIKE_COMFYUI = """
import functools


def wrap_attn(func):
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if wrapper.container_function is not None:
            return wrapper.container_function(*args, **kwargs)
        return func(*args, **kwargs)

    wrapper.container_function = None
    return wrapper
"""


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A module as another process would import it again."""
    (tmp_path / "some_nodes.py").write_text(SOURCE)
    (tmp_path / "comfy_like.py").write_text(LIKE_COMFYUI)
    monkeypatch.syspath_prepend(str(tmp_path))
    import some_nodes

    yield some_nodes
    del sys.modules["some_nodes"], sys.modules["comfy_like"]


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


@pytest.mark.parametrize("first", [True, False])
def test_a_function_is_told_from_its_siblings_of_the_same_name(pack, first):
    assert carried(pack.Node().two_of_one_name(first))(5) == (5 if first else -5)
    assert carried(pack.Node().uncompiled(first))(5) == (5 if first else -5)


@pytest.mark.parametrize("first", [True, False])
def test_a_function_around_one_that_holds_itself_is_made_again(pack, first):
    override = pack.Node().holding_itself(first)
    made = carried(override)
    assert made(5) == override(5) == 2 * 3 * (5 if first else -5)
    (attention,) = (cell.cell_contents for cell in made.__closure__)
    assert attention.container_function is None
    held = [cell.cell_contents for cell in attention.__closure__]
    assert [function in held for function in (attention, attention.__wrapped__)] == [True, True]


def test_partial_functions_lambdas_modules_and_names_without_a_value_are_carried(pack):
    assert carried(pack.Node().of_every_kind(True))(3) == 2 + 6 + 3
    made = carried(pack.Node().of_every_kind(False))
    assert made(3) == -2 + 6 + 3
    with pytest.raises(NameError, match="unset"):  # as where it came from
        made(9)


def test_a_function_decorated_where_it_is_written_is_carried_by_name(pack):
    assert carried(pack.decorated) is pack.decorated


def test_a_function_that_another_took_the_name_of_is_not_run_in_its_place(pack):
    pack.replaced = pack.replacement
    tree = encode_callable(pack.replaced, numbers)
    assert decode_callable(tree, numbers)(0) == 100
    pack.replaced = pack.original  # as another process has it
    with pytest.raises(UncarriedValueError, match="replaced is another one"):
        decode_callable(tree, numbers)


def test_what_is_not_written_in_a_file_is_not_found_again(pack):
    exec("def made_at_run_time(x):\n    return x", vars(pack))
    function = vars(pack).pop("made_at_run_time")
    with pytest.raises(UncarriedValueError, match="made_at_run_time, whose source is not found"):
        encode_callable(function, numbers)


def test_a_pack_of_one_file_is_found_by_it(tmp_path):
    # ComfyUI names it after its path, which may have dots.
    file = tmp_path / "custom.nodes" / "one_file.py"
    file.parent.mkdir()
    file.write_text("def patch(scale):\n    return lambda x: x * scale\n")
    name = str(file.with_suffix(""))
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        tree = encode_callable(module.patch(3), numbers)
        del sys.modules[name]
        assert decode_callable(tree, numbers)(7) == 21
    finally:
        sys.modules.pop(name, None)


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
