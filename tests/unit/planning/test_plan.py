"""Shares, bounds and the grid of ranks."""

from __future__ import annotations

import dataclasses

import pytest

from comfy_xdit_patch.errors import PlanError
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import bounds, shard_sizes, weighted_shares


@pytest.mark.parametrize(
    ("num_items", "num_shards", "expected"),
    [
        (4096, 2, (2048, 2048)),  # 1024 px image
        (4096, 3, (1366, 1365, 1365)),  # the same, odd GPU count
        (512, 8, (64,) * 8),  # T5 prompt
        (24, 5, (5, 5, 5, 5, 4)),  # FLUX.1 heads
        (24, 7, (4, 4, 4, 3, 3, 3, 3)),
        (2, 3, (1, 1, 0)),
        (0, 2, (0, 0)),
    ],
)
def test_shards_are_even_and_larger_first(num_items, num_shards, expected):
    assert shard_sizes(num_items, num_shards) == expected


@pytest.mark.parametrize("num_shards", [0, -1])
def test_no_shards_is_an_error_with_the_numbers(num_shards):
    with pytest.raises(PlanError, match=rf"^Cannot share 7 items among {num_shards} shards\.$"):
        shard_sizes(7, num_shards)


@pytest.mark.parametrize("num_shards", range(1, 10))
@pytest.mark.parametrize("num_items", [0, 1, 7, 24, 257, 4096])
def test_bounds_cover_the_whole_without_gap_or_overlap(num_items, num_shards):
    covered = [
        i for start, end in bounds(shard_sizes(num_items, num_shards)) for i in range(start, end)
    ]
    assert covered == list(range(num_items))


@pytest.mark.parametrize("degrees", [{"batch": 0}, {"batch": -2, "ulysses": -2}])
def test_a_degree_below_one_is_an_error_with_the_numbers(degrees):
    named = {"batch": 1, "ulysses": 1, **degrees}
    text = (
        rf"batch {named['batch']} x pipefusion 1 x ring 1 x ulysses {named['ulysses']} x tensor 1 "
        rf"are not degrees"
    )
    with pytest.raises(PlanError, match=text):
        ParallelPlan(**degrees)


@pytest.mark.parametrize("grid", [(2, 1, 1, 2), (2, 1, 1, 2, 1, 1), ()])
def test_a_grid_with_other_axes_is_an_error(grid):
    with pytest.raises(PlanError, match=rf"^{len(grid)} degrees for the axes batch, pipefusion"):
        ParallelPlan.of_grid(grid, [])


THREE_AXES = "batch+ulysses+ring"


@pytest.mark.parametrize(
    ("plan", "name", "strategy"),
    [
        (ParallelPlan(), "single", "single"),
        (ParallelPlan(ulysses=4), "ulysses=4", "ulysses"),
        (ParallelPlan(batch=2), "batch=2", "batch"),
        (ParallelPlan(batch=2, ulysses=2), "batch=2,ulysses=2", "batch+ulysses"),
        (ParallelPlan(ring=3), "ring=3", "ring"),
        (
            ParallelPlan(batch=2, ulysses=3, ring=2),
            "batch=2,ulysses=3,ring=2",
            "batch+ulysses+ring",
        ),
    ],
)
def test_a_plan_is_named_by_its_degrees_above_one(plan, name, strategy):
    assert (plan.name, plan.strategy) == (name, strategy)


def test_the_sequence_axis_varies_fastest_in_the_grid_of_ranks():
    plan = ParallelPlan(batch=2, ulysses=2)
    assert [plan.batch_index(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [plan.sequence_index(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [plan.batch_rows(rank, 4) for rank in range(4)] == [(0, 2), (0, 2), (2, 4), (2, 4)]


def test_ulysses_varies_faster_than_the_ring_and_both_faster_than_the_batch():
    plan = ParallelPlan(batch=2, ulysses=2, ring=2)
    assert plan.sequence == 4
    assert [plan.batch_index(rank) for rank in range(8)] == [0] * 4 + [1] * 4
    assert [plan.sequence_index(rank) for rank in range(8)] == [0, 1, 2, 3] * 2
    assert [plan.batch_rows(rank, 2) for rank in (0, 3, 4)] == [(0, 1), (0, 1), (1, 2)]


def test_in_a_ring_tokens_are_shared_by_all_and_heads_by_neighbours():
    shares = weighted_shares(
        num_text_tokens=9, num_image_tokens=22, num_heads=5, weights=(1,) * 6, ring_degree=3
    )
    assert shares.joint == (6, 5, 5, 5, 5, 5)
    assert shares.heads == (3, 2)
    assert (shares.ulysses_degree, shares.ring_degree) == (2, 3)


@pytest.mark.parametrize("num_shards", range(1, 10))
@pytest.mark.parametrize(
    ("num_text", "num_image"), [(256, 1024), (257, 36), (700, 2394), (512, 4096), (9, 9), (10, 17)]
)
def test_every_rank_holds_as_many_tokens_as_any_other_but_for_one(num_text, num_image, num_shards):
    shares = weighted_shares(
        num_text_tokens=num_text,
        num_image_tokens=num_image,
        num_heads=24,
        weights=(1,) * num_shards,
    )
    assert sum(shares.text) == num_text
    assert sum(shares.image) == num_image
    assert sum(shares.heads) == 24
    for sizes in (shares.text, shares.image, shares.heads, shares.joint):
        assert len(sizes) == num_shards
        assert max(sizes) - min(sizes) <= 1
    assert min(shares.text + shares.image) >= 1


def test_more_ranks_than_heads_leaves_some_without_heads():
    shares = weighted_shares(num_text_tokens=64, num_image_tokens=64, num_heads=2, weights=(1,) * 3)
    assert shares.heads == (1, 1, 0)


@pytest.mark.parametrize(("num_text", "num_image"), [(2, 100), (100, 2), (0, 9)])
def test_a_rank_without_text_or_image_tokens_is_an_error_with_the_numbers(num_text, num_image):
    with pytest.raises(
        PlanError, match=rf"share {num_text} text tokens and {num_image} image tokens among 3 ranks"
    ):
        weighted_shares(
            num_text_tokens=num_text, num_image_tokens=num_image, num_heads=4, weights=(1,) * 3
        )


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_reference", [0, 1, 7, 63, 500])
def test_reference_tokens_are_shared_and_every_rank_begins_with_the_image(
    num_shards, num_reference
):
    shares = weighted_shares(
        num_text_tokens=40,
        num_image_tokens=63,
        num_reference_tokens=num_reference,
        num_heads=24,
        weights=(1,) * num_shards,
    )
    assert (sum(shares.text), sum(shares.image), sum(shares.reference)) == (40, 63, num_reference)
    assert max(shares.joint) - min(shares.joint) <= 1
    assert min(shares.image) >= 1
    assert min(shares.reference) >= 0
    tokens = [
        token
        for rank in range(num_shards)
        for start, end in shares.places(rank)
        for token in range(start, end)
    ]
    assert sorted(tokens) == list(range(40 + 63 + num_reference)), "each token once"


def test_ranks_of_a_tensor_group_share_heads_and_have_the_same_tokens():
    plan = ParallelPlan(ulysses=2, tensor=3)
    assert [plan.tensor_index(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [plan.sequence_index(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [plan.local_heads(rank, 4) for rank in range(6)] == [2, 1, 1, 2, 1, 1]
    assert [ParallelPlan(ulysses=2).local_heads(rank, 4) for rank in range(2)] == [4, 4]


@pytest.mark.parametrize(
    ("plan", "writers"),
    [
        (ParallelPlan(batch=2, ulysses=2), [0, 2]),
        (ParallelPlan(ulysses=2, ring=2), [0]),
        (ParallelPlan(batch=2, ulysses=2, tensor=2), [0, 4]),
        (ParallelPlan(batch=2, ulysses=2, pipefusion=2), [2, 6]),
        (ParallelPlan(pipefusion=3), [2]),
        (ParallelPlan(tensor=3), [0]),
    ],
)
def test_one_rank_of_those_with_the_same_rows_writes_them(plan, writers):
    assert [rank for rank in range(plan.world_size) if plan.writes_rows(rank)] == writers


def test_ranks_that_cut_the_same_blocks_have_the_same_tokens_however_fast_they_are():
    plan = ParallelPlan(batch=2, ulysses=2, tensor=2, weights=(9, 3, 1, 5, 2, 8, 4, 4))
    for first in range(0, 8, 2):
        assert shares_of(plan, first) == shares_of(plan, first + 1)
        assert plan.batch_rows(first, 5) == plan.batch_rows(first + 1, 5)
    assert [shares_of(plan, rank).joint for rank in (0, 4)] == [(360, 120), (160, 320)]


def shares_of(plan, rank, **sizes):
    sizes = {"num_text_tokens": 96, "num_image_tokens": 384, "num_heads": 12} | sizes
    return plan.sequence_shares(rank, **sizes)


def test_equal_weights_are_no_weights():
    for plan in (
        ParallelPlan(ulysses=3, ring=2),
        ParallelPlan(batch=2, ulysses=2),
        ParallelPlan(ulysses=3),
    ):
        weighted = dataclasses.replace(plan, weights=(7,) * plan.world_size)
        for rank in range(plan.world_size):
            assert shares_of(weighted, rank, num_heads=7) == shares_of(plan, rank, num_heads=7)
            assert weighted.batch_rows(rank, 5) == plan.batch_rows(rank, 5)


def test_each_group_shares_its_rows_by_its_own_weights():
    plan = ParallelPlan(batch=2, ulysses=2, weights=(3, 1, 1, 1))
    assert shares_of(plan, 1).joint == (360, 120)
    assert shares_of(plan, 1).heads == (9, 3)
    assert shares_of(plan, 2).joint == (240, 240)
    assert [plan.batch_rows(rank, 6) for rank in range(4)] == [(0, 4), (0, 4), (4, 6), (4, 6)]


def test_in_a_ring_tokens_follow_all_weights_and_heads_those_of_every_neighbourhood():
    plan = ParallelPlan(ulysses=2, ring=2, weights=(2, 1, 4, 2))
    shares = shares_of(plan, 3, num_image_tokens=354)
    assert shares.joint == (100, 50, 200, 100)
    assert shares.heads == (8, 4)
    # The faster of one neighbourhood is the slower of the other: halves.
    assert shares_of(ParallelPlan(ulysses=2, ring=2, weights=(2, 1, 1, 2)), 0).heads == (6, 6)
    assert shares_of(ParallelPlan(ring=2, weights=(2, 1)), 0).heads == (12,)


def test_ranks_that_have_the_same_tokens_count_as_their_slowest():
    of_columns = ParallelPlan(ulysses=2, tensor=2, weights=(9, 3, 1, 5))
    assert [of_columns.place_weights(0), shares_of(of_columns, 3).joint] == [(3, 1), (360, 120)]
    of_stages = ParallelPlan(ulysses=2, pipefusion=2, weights=(9, 1, 3, 5))
    assert [of_stages.place_weights(0), shares_of(of_stages, 0).joint] == [(3, 1), (360, 120)]
