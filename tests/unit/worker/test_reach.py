"""What code reaches, on modules made for it."""

from __future__ import annotations

import sys
import types

import pytest

from comfy_xdit_patch.host.reading.compared import Compared
from comfy_xdit_patch.wire.messages.replies import Reached
from comfy_xdit_patch.worker.reach import reached

SOURCE = """
import comfy.reach_math as other
import math

FACTOR = 2.0
CALLS = 0
CACHE = {}

def made(by):
    def scaled(x):
        return x * by

    return scaled

scaled = made(2.0)
TABLE = {"scaled": scaled}

def wrap_for_dlpack(x):
    return x

def helper(x, shift=0.0):
    global CALLS
    CALLS += 1
    wrap_for_dlpack(x)
    return other.root(x) * FACTOR + len(CACHE) + TABLE["scaled"](scaled(x))

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


def test_state_what_nobody_calls_and_exports_of_memory_are_not(names) -> None:
    in_blocks, around = names
    assert not {"CALLS", "CACHE", "unused", "wrap_for_dlpack"} & {
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


def change_method(module):
    module.Block.__mul__ = lambda self, x: 0


def hide_what_is_inherited(module):
    module.Block.forward = lambda self, x: 0


def change_code(module):
    module.helper.__code__ = (lambda x: x).__code__


def change_default(module):
    module.helper.__defaults__ = (1.0,)


def change_what_is_closed_over(module):
    module.scaled.__closure__[0].cell_contents = 3.0


def change_table(module):
    module.TABLE["scaled"] = lambda x: x


CHANGES = [change_function, change_constant, change_method, hide_what_is_inherited]
INSIDE = [change_code, change_default, change_what_is_closed_over, change_table]


@pytest.mark.parametrize("change", [*CHANGES, *INSIDE])
def test_a_change_is_seen_and_its_end_too(names, change) -> None:
    """Of names in every step, inside of what has a name once a run."""
    module = sys.modules["comfy.reach"]
    compared = Compared(Reached(1, *names, kernels=[], modes=[]))
    is_first = change in INSIDE
    assert compared.changes(is_first=is_first) == []
    before = dict(vars(module))
    table, code, defaults = dict(module.TABLE), module.helper.__code__, module.helper.__defaults__
    mul = module.Block.__mul__
    change(module)
    found = compared.changes(is_first=is_first)
    assert len(found) == (2 if change is change_what_is_closed_over else 1), found
    assert compared.changes(is_first=False) == found
    vars(module).update(before)
    module.TABLE.update(table)
    module.helper.__code__, module.helper.__defaults__ = code, defaults
    module.scaled.__closure__[0].cell_contents = 2.0
    module.Block.__mul__ = mul
    if "forward" in vars(module.Block):
        del module.Block.forward
    assert compared.changes(is_first=is_first) == []


def test_what_is_torchs_is_never_around_blocks_only() -> None:
    """Code of ours in ComfyUI's process computes with it as well."""
    texts = {"torch": {"arange": "another"}, "comfy.ldm.flux.model": {"Flux": "another"}}
    changes = Compared(Reached(1, {}, texts, kernels=[], modes=[])).changes(is_first=True)
    assert {change.reason.split()[0]: change.is_around_blocks for change in changes} == {
        "torch.arange": False
    }
