"""A model that is cut takes its part of the blocks on each card."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.cost.known_models import FLUX1_DEV
from comfy_xdit_patch.planning.cost.model_shape import PRECISIONS
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.residency import (
    GIB,
    Card,
    ModelSizes,
    plan_residency,
    token_load,
)

MODEL = ModelSizes(total_bytes=11 * GIB, largest_block_bytes=GIB, outside_blocks_bytes=GIB)
IMAGE = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=4096, num_heads=24)


def cards(gib, number):
    return (Card(gib * GIB, gib * GIB),) * number


def planned(model, degree, where):
    num_ranks = len(where)
    plan = ParallelPlan(num_ranks, 1, num_ranks // degree, tensor_degree=degree)
    load = token_load(plan, IMAGE, num_blocks=57, hidden_size=3072)
    return plan_residency(plan, model, load, num_blocks=57, cards=where)


@pytest.mark.parametrize(("degree", "gib"), [(2, 6), (4, 3.5)])
def test_blocks_are_divided_and_what_is_outside_is_not(degree, gib):
    plan = planned(MODEL, degree, cards(24, 4))
    assert not isinstance(plan, Refusal)
    weights = next(cost for cost in plan.needs[-1].costs if cost.what == "weights")
    assert weights.num_bytes == gib * GIB
    assert plan.needs[-1].text.startswith("blocks cut by heads and columns: ")


def activations(degree):
    plan = planned(MODEL, degree, cards(24, 4))
    return next(c.what for c in plan.needs[-1].costs if c.what.startswith("activations"))


def test_ranks_of_a_tensor_group_hold_the_same_tokens():
    assert "1088 of 4352 tokens" in activations(1)
    assert "2176 of 4352 tokens" in activations(2)
    assert "4352 of 4352 tokens" in activations(4)


def test_a_model_that_is_too_large_for_one_card_fits_on_two_in_halves():
    model = FLUX1_DEV.sizes(PRECISIONS["bf16"])
    assert model.total_bytes > 20 * GIB
    assert not isinstance(planned(model, 2, cards(20, 2)), Refusal)
    refused = planned(model, 2, cards(10, 2))
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith("the model does not fit on 2 cards (blocks cut by heads")
