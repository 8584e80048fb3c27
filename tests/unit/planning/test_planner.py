"""Batch first, then the sequence; every rank works or the call is refused."""

from __future__ import annotations

import dataclasses

import pytest

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.planning.plan import Workload
from comfy_xdit_patch.planning.planner import plan_call

IMAGE_1024 = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=4096, num_heads=24)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "expected"),
    [
        (1, 1, "single"),
        (1, 4, "ulysses=4"),
        (1, 7, "ulysses=7"),
        (2, 2, "batch=2"),
        (2, 4, "batch=2,ulysses=2"),
        (2, 3, "ulysses=3"),  # two rows on three ranks: equal shares only along the sequence
        (3, 6, "batch=3,ulysses=2"),
        (4, 6, "batch=2,ulysses=3"),
        (4, 2, "batch=2"),
        (8, 4, "batch=4"),
    ],
)
def test_the_batch_is_shared_first_and_the_sequence_takes_the_rest(
    batch_size, world_size, expected
):
    plan = plan_call(dataclasses.replace(IMAGE_1024, batch_size=batch_size), world_size=world_size)
    assert plan.name == expected
    assert plan.world_size == world_size


def test_a_batch_whose_tensors_do_not_all_have_its_rows_is_shared_along_the_sequence():
    workload = dataclasses.replace(IMAGE_1024, batch_size=2, is_batch_divisible=False)
    assert plan_call(workload, world_size=2).name == "ulysses=2"


@pytest.mark.parametrize(("num_text", "num_image"), [(3, 4096), (256, 3)])
def test_too_few_tokens_for_the_ranks_are_refused_for_this_step(num_text, num_image):
    workload = dataclasses.replace(IMAGE_1024, num_text_tokens=num_text, num_image_tokens=num_image)
    refusal = plan_call(workload, world_size=4)
    assert isinstance(refusal, Refusal)
    assert refusal.scope is Scope.STEP
    assert "fewer tokens than 4 ranks need" in refusal.reason


def test_few_tokens_are_no_obstacle_where_the_batch_alone_is_shared():
    workload = dataclasses.replace(IMAGE_1024, batch_size=4, num_text_tokens=1, num_image_tokens=1)
    assert plan_call(workload, world_size=4).name == "batch=4"
