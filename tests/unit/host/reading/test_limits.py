"""A ring takes the place of exact attention functions that nobody chose, and of no others."""

from __future__ import annotations

import sys
import types

import pytest

from comfy_xdit_patch.errors import Scope
from comfy_xdit_patch.host.reading.limits import EXACT, no_ring


@pytest.fixture
def comfyui(monkeypatch):
    """Return a function that puts a ComfyUI with one attention function in place."""

    def started_with(name):
        def function():
            """Stand for ComfyUI's function; only its name is looked at."""

        function.__name__ = name
        module = types.ModuleType("comfy.ldm.flux.math")
        module.optimized_attention = function
        parents = [types.ModuleType(n) for n in ("comfy", "comfy.ldm", "comfy.ldm.flux")]
        for parent, child in zip(parents, (*parents[1:], module), strict=True):
            setattr(parent, child.__name__.rpartition(".")[2], child)
        for made in (*parents, module):
            monkeypatch.setitem(sys.modules, made.__name__, made)

    return started_with


@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_functions_may_be_replaced(comfyui, name):
    comfyui(name)
    assert no_ring() is None


@pytest.mark.parametrize(
    "name", ["attention_sage", "attention3_sage", "attention_comfy_kitchen_int8", "attention_new"]
)
def test_others_may_not(comfyui, name):
    comfyui(name)
    refusal = no_ring()
    assert refusal.scope is Scope.STEP
    assert name in refusal.reason


def test_what_a_node_chose_is_not_replaced_even_if_it_is_exact(comfyui):
    comfyui("attention_pytorch")
    assert "a node chose" in no_ring(is_overridden=True).reason


def test_an_attention_that_a_checkpoint_prescribes_is_not_replaced(comfyui):
    comfyui("attention_pytorch")
    refusal = no_ring(is_prescribed=True)
    assert refusal is not None
    assert "the checkpoint prescribes its attention" in refusal.reason
