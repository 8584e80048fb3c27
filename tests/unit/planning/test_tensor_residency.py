"""A model that is cut takes its part of the blocks on each card."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.cost.known_models import FLUX1_DEV
from comfy_xdit_patch.planning.cost.model_shape import PRECISIONS
from comfy_xdit_patch.planning.residency import (
    GIB,
    Card,
    ModelSizes,
    TokenLoad,
    plan_tensor_residency,
    tensor_degree,
    tensor_mode,
)

MODEL = ModelSizes(total_bytes=11 * GIB, largest_block_bytes=GIB, outside_blocks_bytes=GIB)
LOAD = TokenLoad(num_image_tokens=4096, num_text_tokens=256, hidden_size=3072)


def cards(gib, number):
    return (Card(gib * GIB, gib * GIB),) * number


def test_a_mode_says_into_how_many_parts_blocks_are_cut():
    assert [tensor_degree(mode) for mode in ("full", "sharded", "offload")] == [1, 1, 1]
    assert tensor_degree(tensor_mode(4)) == 4


@pytest.mark.parametrize(("degree", "gib"), [(1, 11), (2, 6), (4, 3.5)])
def test_blocks_are_divided_and_what_is_outside_is_not(degree, gib):
    plan = plan_tensor_residency(MODEL, LOAD, degree, cards=cards(24, 4))
    assert not isinstance(plan, Refusal)
    weights = next(cost for cost in plan.needs[-1].costs if cost.what == "weights")
    assert weights.num_bytes == gib * GIB
    assert plan.needs[-1].text.startswith("blocks cut by heads and columns: ")


def activations(load, degree):
    plan = plan_tensor_residency(MODEL, load, degree, cards=cards(24, 4))
    return next(cost for cost in plan.needs[-1].costs if cost.what.startswith("activations"))


def test_ranks_of_a_tensor_group_hold_the_same_tokens_and_their_rows_once():
    assert "1088 of 4352 tokens" in activations(LOAD, 1).what
    assert "2176 of 4352 tokens" in activations(LOAD, 2).what
    told = activations(replace(LOAD, local_tokens=2176), 2)
    assert told == activations(LOAD, 2)


def test_a_model_that_is_too_large_for_one_card_fits_on_two_in_halves():
    model = FLUX1_DEV.sizes(PRECISIONS["bf16"])
    assert model.total_bytes > 20 * GIB
    assert not isinstance(plan_tensor_residency(model, LOAD, 2, cards=cards(20, 2)), Refusal)
    refused = plan_tensor_residency(model, LOAD, 2, cards=cards(10, 2))
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith("the model does not fit on 2 cards (blocks cut by heads")
