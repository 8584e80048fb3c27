"""Attention that a checkpoint prescribes runs under an override of ours.

The module stands for ComfyUI's from 0.39 on, with its names: ``wrap_attn`` takes
``preferred_attention`` away and asks it for a function only where there is no override.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.worker.attention.attention import SequenceAttention
from comfy_xdit_patch.worker.attention.prescribed import attention_of_blocks
from comfy_xdit_patch.worker.ranks.groups import PlanGroups

LIKE_COMFYUI = """
def wrap_attn(func):
    def wrapper(*args, **kwargs):
        preferred_attention = kwargs.pop("preferred_attention", None)
        if "_inside_attn_wrapper" in kwargs:
            return func(*args, **kwargs)
        kwargs["_inside_attn_wrapper"] = True
        options = kwargs.get("transformer_options")
        if options is not None and "optimized_attention_override" in options:
            return options["optimized_attention_override"](func, *args, **kwargs)
        if preferred_attention is not None and preferred_attention.function is not None:
            return preferred_attention.function(*args, **kwargs)
        return func(*args, **kwargs)

    return wrapper


@wrap_attn
def optimized_attention(q, k, v, heads, mask=None, **kwargs):
    return v.transpose(1, 2).flatten(2)


@wrap_attn
def attention_comfy_kitchen_int8(q, k, v, heads, mask=None, **kwargs):
    return v.cumsum(2).transpose(1, 2).flatten(2)  # the order of tokens matters


def attention(q, k, v, pe, mask=None, transformer_options={}, preferred_attention=None):
    options = transformer_options
    return optimized_attention(
        q, k, v, q.shape[1], mask=mask, transformer_options=options,
        preferred_attention=preferred_attention,
    )
"""
OLD = "def attention(q, k, v, pe, mask=None, transformer_options={}): pass\noptimized_attention = 1"


class ComfyAttention:
    """A block's module; without a kernel for the card its function is None."""

    def __init__(self, function):
        self.function = function


@pytest.fixture
def comfyui(monkeypatch):
    """Return a function that puts a ``comfy.ldm.flux.math`` in place."""

    def of(source):
        module = types.ModuleType("comfy.ldm.flux.math")
        exec(source, vars(module))
        parents = [types.ModuleType(n) for n in ("comfy", "comfy.ldm", "comfy.ldm.flux")]
        for parent, child in zip(parents, (*parents[1:], module), strict=True):
            setattr(parent, child.__name__.rpartition(".")[2], child)
        for made in (*parents, module):
            monkeypatch.setitem(sys.modules, made.__name__, made)
        return module

    return of


def ours(function=None):
    shares = ParallelPlan().sequence_shares(
        0, num_text_tokens=2, num_image_tokens=4, num_reference_tokens=0, num_heads=2
    )
    return SequenceAttention(
        shares=shares,
        index=0,
        groups=PlanGroups(sequence=None, ulysses=None, ring=None),
        function=function,
    )


qkv = tuple(torch.rand(1, 2, 6, 4, generator=torch.Generator().manual_seed(1)) for _ in range(3))


def test_what_a_block_prescribes_runs_as_in_comfyui(comfyui):
    math = comfyui(LIKE_COMFYUI)
    block = ComfyAttention(math.attention_comfy_kitchen_int8)
    options = {"optimized_attention_override": ours()}
    stock = math.attention(*qkv, None, preferred_attention=block)
    plain = math.attention(*qkv, None)
    assert not torch.equal(stock, plain)
    hidden = math.attention(*qkv, None, transformer_options=options, preferred_attention=block)
    assert torch.equal(hidden, plain), "an override hides it: the fault"
    before = math.optimized_attention
    with attention_of_blocks():
        out = math.attention(*qkv, None, transformer_options=options, preferred_attention=block)
        assert torch.equal(out, stock)
        for nothing in (None, ComfyAttention(None)):
            out = math.attention(
                *qkv, None, transformer_options=options, preferred_attention=nothing
            )
            assert torch.equal(out, plain)
        out = math.attention(*qkv, None, preferred_attention=block)
        assert torch.equal(out, stock), "where no override is ours, ComfyUI finds it itself"
    assert math.optimized_attention is before


def test_an_override_of_a_nodes_goes_before_what_a_block_prescribes(comfyui):
    math = comfyui(LIKE_COMFYUI)
    block = ComfyAttention(math.attention_comfy_kitchen_int8)

    def chosen(function, *args, **kwargs):
        return 2 * function(*args, **kwargs)

    options = {"optimized_attention_override": chosen}
    stock = math.attention(*qkv, None, transformer_options=options, preferred_attention=block)
    with attention_of_blocks():
        options = {"optimized_attention_override": ours(chosen)}
        out = math.attention(*qkv, None, transformer_options=options, preferred_attention=block)
    assert torch.equal(out, stock)


def test_a_comfyui_without_such_checkpoints_is_left_alone(comfyui):
    math = comfyui(OLD)
    with attention_of_blocks():
        assert math.optimized_attention == 1
