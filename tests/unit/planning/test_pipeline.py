"""Stages have all blocks between them, pipeline patches all tokens, each once."""

from __future__ import annotations

import dataclasses

import pytest

from comfy_xdit_patch.errors import PlanError
from comfy_xdit_patch.planning.pipeline import (
    kept_bytes,
    most_blocks,
    num_patches,
    patch_shares,
    stage_blocks,
)
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload

IMAGE_1024 = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=4096, num_heads=24)


def pipeline(stages, ulysses=1, batch=1, weights=()):
    return ParallelPlan(batch=batch, ulysses=ulysses, pipefusion=stages, weights=weights)


@pytest.mark.parametrize(
    ("stages", "num_blocks", "expected"),
    [
        (2, 57, [29, 28]),  # FLUX.1
        (4, 57, [15, 14, 14, 14]),
        (8, 57, [8, 7, 7, 7, 7, 7, 7, 7]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_stages_follow_each_other_and_differ_by_a_block(stages, num_blocks, expected):
    plan = pipeline(stages, ulysses=2)
    ranges = [stage_blocks(plan, rank, num_blocks) for rank in range(0, plan.world_size, 2)]
    assert [len(blocks) for blocks in ranges] == expected
    assert [block for blocks in ranges for block in blocks] == [*range(num_blocks)]
    assert stage_blocks(plan, 1, num_blocks) == ranges[0], "ranks of a stage have the same blocks"


def test_a_stage_has_blocks_by_the_speed_of_its_slowest_rank():
    plan = pipeline(2, ulysses=2, weights=(4, 2, 1, 3))
    assert [len(stage_blocks(plan, rank, 57)) for rank in (0, 2)] == [38, 19]
    slow = pipeline(3, weights=(100, 100, 1))
    assert [len(stage_blocks(slow, rank, 4)) for rank in range(3)] == [2, 1, 1]


def test_more_stages_than_blocks_are_an_error():
    with pytest.raises(PlanError):
        stage_blocks(pipeline(4), 0, 3)


@pytest.mark.parametrize(
    ("stages", "ulysses", "text", "image", "expected"),
    [
        (2, 1, 256, 4096, 4),
        (4, 2, 256, 4096, 8),
        (2, 1, 3, 4096, 3),  # a text token for each
        (2, 2, 77, 9, 2),  # two image tokens for each shard
        (4, 4, 2, 1, 1),  # too few; the planner refuses the call
    ],
)
def test_there_are_twice_as_many_patches_as_stages_where_tokens_suffice(
    stages, ulysses, text, image, expected
):
    workload = dataclasses.replace(IMAGE_1024, num_text_tokens=text, num_image_tokens=image)
    assert num_patches(pipeline(stages, ulysses), workload) == expected


@pytest.mark.parametrize("references", [0, 5, 4000])
@pytest.mark.parametrize("ulysses", [1, 2, 3])
@pytest.mark.parametrize(("text", "image"), [(256, 4096), (77, 30), (13, 400), (12, 24)])
def test_every_token_is_in_one_shard_of_one_patch(text, image, ulysses, references):
    plan = pipeline(2, ulysses)
    workload = dataclasses.replace(
        IMAGE_1024,
        num_text_tokens=text,
        num_image_tokens=image,
        num_reference_tokens=references,
    )
    patches = num_patches(plan, workload)
    shares = patch_shares(
        plan,
        patches,
        num_text_tokens=text,
        num_image_tokens=image,
        num_reference_tokens=references,
        num_heads=24,
    )
    assert (shares.ring_degree, shares.ulysses_degree) == (patches, ulysses)
    tokens = [
        token
        for shard in range(patches * ulysses)
        for start, end in shares.places(shard)
        for token in range(start, end)
    ]
    assert sorted(tokens) == [*range(text + image + references)]
    assert sum(shares.heads) == 24


def test_the_largest_stage_counts():
    assert most_blocks(pipeline(4, ulysses=2), 57) == 15
    assert most_blocks(pipeline(2, weights=(3, 1)), 57) == 43


def test_keys_and_values_take_two_features_for_each_token_and_block_of_a_stage():
    sizes = {"num_blocks": 57, "token_bytes": 3072 * 2}
    one = 2 * 29 * 4352 * 3072 * 2
    assert kept_bytes(pipeline(2), IMAGE_1024, **sizes) == one
    assert kept_bytes(pipeline(2, ulysses=2), IMAGE_1024, **sizes) == one // 2
    rows = dataclasses.replace(IMAGE_1024, batch_size=3)
    assert kept_bytes(pipeline(2, batch=2), rows, **sizes) == 2 * one
    assert kept_bytes(ParallelPlan(ulysses=4), IMAGE_1024, **sizes) == 0
