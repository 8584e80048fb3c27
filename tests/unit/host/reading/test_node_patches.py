"""What nodes put into ``transformer_options``: carried, left around the blocks, or refused."""

from __future__ import annotations

import functools
import importlib
import sys

import pytest
import torch

from comfy_xdit_patch.host.reading.node_patches import carry, other_options

calls = 0


def plain_patch(*args):
    return args


def counting_patch(*args):
    global calls
    calls += 1


def remembering():
    last = None

    def patch(x):
        nonlocal last
        last, before = x, last
        return before

    return patch


def collecting():
    seen = []

    def patch(x):
        seen.append(x)

    return patch


def sort(options, reads=lambda kind: True):
    return carry(options, reads=reads, numbers=lambda thing: 1)


def test_nothing_is_carried_where_nothing_is_set():
    carried = sort({"patches": {"double_block": []}, "patches_replace": {"dit": {}}})
    assert (carried.tree, carried.refusals) == (None, [])


@pytest.mark.parametrize("kind", ["attn1_patch", "attn1_output_patch"])
def test_an_unknown_patch_inside_of_blocks_is_gathered_for(kind):
    carried = sort({"patches": {kind: [plain_patch]}})
    assert carried.refusals == []
    assert list(carried.tree["patches"]["gathered"]) == [kind]
    assert carried.gathered == f"a node set a {kind} patch, {__name__}.plain_patch"


def test_a_patch_that_the_model_never_reads_changes_nothing():
    options = {
        "patches": {"attn1_patch": [counting_patch]},
        "patches_replace": {"attn1": {("input", 0): plain_patch}, "dit": {("middle", 0): 1}},
    }
    carried = sort(options, reads=lambda kind: False)
    assert (carried.tree, carried.refusals) == (None, [])


@pytest.mark.parametrize("patch", [counting_patch, remembering(), collecting()])
def test_a_patch_that_keeps_something_between_calls_is_refused(patch):
    for options in (
        {"patches": {"attn1_patch": [patch]}},
        {"optimized_attention_override": patch},
    ):
        carried = sort(options)
        assert carried.tree is None
        (refusal,) = carried.refusals
        assert not refusal.is_around_blocks


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"post_input": [counting_patch]}},
        {"patches_replace": {"dit": {("single_block", 3): remembering()}}},
    ],
)
def test_what_works_around_the_blocks_may_keep_what_it_likes(options):
    carried = sort(options)
    assert carried.tree is None
    assert [refusal.is_around_blocks for refusal in carried.refusals] == [True]


def test_an_unknown_attention_function_is_given_the_tokens_in_order():
    carried = sort({"optimized_attention_override": plain_patch})
    assert carried.tree["attention"]["wants_order"]


def test_options_that_patches_may_read_are_carried_and_the_others_named():
    sigmas = torch.ones(3)
    options = {
        "sigmas": sigmas,
        "cond_or_uncond": [0, 1],
        "mine": {"a": (1.5, None)},
        "model": object(),
        "patches": {"attn1_patch": [plain_patch]},
        "wrappers": object(),
    }
    carried = other_options(options)
    assert set(carried["values"]) == {"sigmas", "cond_or_uncond", "mine"}
    assert carried["missing"] == ["model"]


PACK = """
import functools

import torch


def wrapping(function):
    @functools.wraps(function)
    def wrapper(*args):
        return wrapper.__wrapped__(*args)

    return wrapper


def holding_itself():
    def kernel(q):
        return q

    kernel = torch.compiler.disable()(kernel)

    @wrapping
    def attention(q):
        return kernel(q)

    return lambda function, q: attention(q)


def imitation():
    def attention_pytorch(function, q):
        return q.flip(2)

    attention_pytorch.__module__ = "comfy.ldm.modules.attention"
    attention_pytorch.__qualname__ = "attention_pytorch"
    return attention_pytorch
"""


@pytest.mark.parametrize("name", ["holding_itself", "imitation"])
def test_an_override_is_carried_and_given_the_tokens_in_order(name, tmp_path, monkeypatch):
    # Whatever it holds (itself, a kernel kept from the compiler), and whatever name it has taken.
    (tmp_path / "some_pack.py").write_text(PACK)
    monkeypatch.syspath_prepend(str(tmp_path))
    override = getattr(importlib.import_module("some_pack"), name)()
    carried = sort({"optimized_attention_override": override})
    del sys.modules["some_pack"]
    assert carried.refusals == []
    assert carried.tree["attention"]["wants_order"]


def with_a_default(patch):
    def override(function, q, patch=patch):
        return patch(q)

    return override


def with_an_attribute(patch):
    def override(function, q):
        return override.patch(q)

    override.patch = patch
    return override


@pytest.mark.parametrize("held", [with_a_default, with_an_attribute, torch.compiler.disable()])
def test_what_keeps_something_between_calls_is_seen_wherever_it_is_held(held):
    for patch in (collecting(), functools.partial(collecting())):
        override = held(patch)
        (refusal,) = sort({"optimized_attention_override": override}).refusals
        assert "may keep something" in refusal.reason
