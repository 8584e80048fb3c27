"""What code reaches, on modules made for it."""

from __future__ import annotations

import sys
import types

import pytest

from comfy_xdit_patch.engine.reach import reached
from comfy_xdit_patch.patching.compared import Compared
from comfy_xdit_patch.transport.likeness import Reached

SOURCE = """
import comfy.reach_math as other
import math

FACTOR = 2.0
CALLS = 0
CACHE = {}

def helper(x):
    global CALLS
    CALLS += 1
    return other.root(x) * FACTOR + len(CACHE)

def unused(x):
    return x

class Base:
    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        return helper(x)

class Block(Base):
    def __mul__(self, x):
        return x

class Head(Base):
    def forward(self, x):
        return self.scale(x)

    def scale(self, x):
        return math.floor(x)
"""


@pytest.fixture
def names(monkeypatch):
    other = types.ModuleType("comfy.reach_math")
    exec("def root(x):\n    return x ** 0.5", vars(other))
    module = types.ModuleType("comfy.reach")
    package = types.ModuleType("comfy")
    package.reach_math = other
    for one in (package, other, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    exec(SOURCE, vars(module))
    return reached(["comfy.reach:Block"], ["comfy.reach:Head"])


def test_functions_constants_and_methods_are_reached(names) -> None:
    in_blocks, _ = names
    assert {"helper", "FACTOR"} <= set(in_blocks["comfy.reach"])
    assert "root" in in_blocks["comfy.reach_math"]
    assert {"__mul__"} <= set(in_blocks["comfy.reach:Block"])


def test_state_and_what_nobody_calls_are_not(names) -> None:
    in_blocks, around = names
    assert not {"CALLS", "CACHE", "unused"} & {
        *in_blocks["comfy.reach"],
        *around["comfy.reach:Head"],
    }


def test_what_blocks_do_not_reach_is_around_them(names) -> None:
    in_blocks, around = names
    assert "floor" in around["math"]
    assert "floor" not in in_blocks.get("math", {})


def change_function(module):
    module.helper = lambda x: x


def change_constant(module):
    module.FACTOR = 3.0


def change_code(module):
    module.helper.__code__ = (lambda x: x).__code__


def hide_a_method(module):
    module.Block.__mul__ = lambda self, x: 0


@pytest.mark.parametrize("change", [change_function, change_constant, change_code, hide_a_method])
def test_a_change_is_seen_and_its_end_too(names, change) -> None:
    module = sys.modules["comfy.reach"]
    compared = Compared(Reached(1, *names, kernels=[]))
    assert compared.changes(is_first=False) == []
    before, code, mul = dict(vars(module)), module.helper.__code__, module.Block.__mul__
    change(module)
    assert len(compared.changes(is_first=False)) == 1
    vars(module).update(before)
    module.helper.__code__ = code
    module.Block.__mul__ = mul
    assert compared.changes(is_first=False) == []
