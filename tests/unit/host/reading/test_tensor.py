"""What would be wrong on a part of the heads or of a weight is refused, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.reading.limits import no_tensor_call, no_tensor_weights
from comfy_xdit_patch.host.reading.node_patches import CarriedPatches


def carried(*, patches=(), skip=(), attention=None):
    modes = {"native": {"attn1_output_patch": list(patches)}, "gathered": {}}
    return CarriedPatches({"patches": modes, "skip": list(skip), "attention": attention})


def test_calls_without_patches_in_blocks_are_cut():
    mask = torch.zeros(2, 8, 8)
    for arguments in ({}, {"attention_mask": mask}, {"attention_mask": mask[:, None]}):
        assert no_tensor_call(arguments, CarriedPatches(), []) is None
    skips_and_chooses = carried(skip=[["double_block", 0]], attention={"function": 1})
    assert no_tensor_call({}, skips_and_chooses, []) is None


def test_a_patch_in_blocks_would_see_some_of_the_heads():
    refusal = no_tensor_call({}, carried(patches=[1]), [])
    assert refusal is not None
    assert refusal.reason.endswith("a node's patch may look at all of them")
    assert refusal.scope is Scope.STEP


def test_a_mask_for_each_head_is_not_cut():
    refusal = no_tensor_call({"attention_mask": torch.zeros(1, 4, 8, 8)}, None, [])
    assert refusal is not None
    assert refusal.reason.endswith("the attention mask differs between them")


@pytest.mark.parametrize("scope", Scope)
def test_what_runs_around_blocks_is_named_and_lasts_as_long(scope):
    change = Refusal("a node replaces blocks", scope, is_around_blocks=True)
    refusal = no_tensor_call({}, carried(patches=[1]), [change])
    assert refusal is not None
    assert refusal.reason.endswith("they cannot be run one by one: a node replaces blocks")
    assert refusal.scope is scope


class Single(torch.nn.Module):
    """A single block's linears, as ComfyUI has them."""

    num_heads, hidden_size, mlp_hidden_dim, mlp_hidden_dim_first = 2, 16, 64, 64
    modulation = None

    def __init__(self):
        super().__init__()
        self.linear1 = torch.nn.Linear(16, 3 * 16 + 64)
        self.linear2 = torch.nn.Linear(16 + 64, 16)


def model(block):
    flux = torch.nn.Module()
    flux.double_blocks = torch.nn.ModuleList()
    flux.single_blocks = torch.nn.ModuleList([block])
    patcher = SimpleNamespace(backup={}, hook_backup={})
    return SimpleNamespace(diffusion_model=flux, current_patcher=patcher)


def test_plain_weights_and_one_scale_for_all_are_cut():
    block = Single()
    assert no_tensor_weights(model(block), 2, {}) is None
    block.linear1.weight = torch.nn.Parameter(block.linear1.weight.to(torch.float8_e4m3fn), False)
    block.linear1.scale_weight = torch.nn.Parameter(torch.ones(()), requires_grad=False)
    assert no_tensor_weights(model(block), 2, {}) is None


def test_a_scale_for_each_row_and_whole_numbers_are_not():
    block = Single()
    block.linear2.scale_weight = torch.nn.Parameter(torch.ones(16), requires_grad=False)
    refusal = no_tensor_weights(model(block), 2, {})
    assert refusal is not None
    assert refusal.reason.endswith("these are quantised in groups")
    block = Single()
    block.linear1.weight = torch.nn.Parameter(torch.zeros(112, 16, dtype=torch.int8), False)
    assert no_tensor_weights(model(block), 2, {}) is not None


def test_the_stored_weight_counts_and_not_one_that_is_patched():
    block = Single()
    of_block = model(block)
    key = "diffusion_model.single_blocks.0.linear1.weight"
    stored = torch.zeros(112, 16, dtype=torch.int8)
    of_block.current_patcher.backup[key] = SimpleNamespace(weight=stored)
    assert no_tensor_weights(of_block, 2, {}) is not None
