"""Descriptions are the same for the same thing in any process, and others for another thing."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch

from comfy_xdit_patch.wire.describing import description, description_of_module, found

VALUES = {
    "function": "torch.nn.functional.layer_norm",
    "builtin": "torch.nn.functional.linear",
    "method": "torch.nn.Linear.forward",
    "class": "torch.nn.Linear",
    "dtype": "torch.bfloat16",
    "module": "torch.nn.functional",
    "frozen set": "frozenset({'a', 'b', 'c', 'd'})",
}


def test_two_processes_have_the_same_descriptions() -> None:
    code = "import torch; from comfy_xdit_patch.wire.describing import description\n"
    code += f"for text in {list(VALUES.values())!r}: print(description(eval(text)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [description(eval(text)) for text in VALUES.values()]


def scaled(by: float):
    def function(x: float) -> float:
        return x * by

    return function


def plus_one(x):
    return x + 1


def plus_two(x):
    return x + 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (plus_one, plus_two),
        (scaled(2.0), scaled(3.0)),
        (functools.partial(plus_one, 1), functools.partial(plus_one, 2)),
        (torch.nn.functional.linear, torch.nn.functional.gelu),
        (True, 1),
        (torch.float16, torch.bfloat16),
        ({"a": plus_one}, {"a": plus_two}),
    ],
)
def test_another_thing_has_another_description(one, other) -> None:
    assert description(one) != description(other)


def test_what_holds_state_has_none() -> None:
    assert description(object()) == ""


def test_a_module_that_is_not_imported_is_known_by_its_name() -> None:
    assert description(torch.nn) == description_of_module("torch.nn")


def test_names_are_found_where_they_are_imported() -> None:
    assert found("torch.nn.modules.linear:Linear.forward") is torch.nn.Linear.forward
    assert found("no.such.module:name") is None
