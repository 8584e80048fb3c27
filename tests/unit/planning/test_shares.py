"""Shares of unequal ranks: exact sums, minimums, the even case.

Properties are checked on many random cases; a failure shows the numbers of its case.
"""

from __future__ import annotations

import random

import pytest

from comfy_xdit_patch.errors import PlanError
from comfy_xdit_patch.planning.sequence_shares import (
    DAMPING,
    SMALLEST_PART,
    moved_weights,
    proportional,
    shard_sizes,
    weighted_shares,
)

NUM_CASES = 300


def cases():
    return map(random.Random, range(NUM_CASES))


def random_weights(chance, num_ranks):
    return tuple(10 ** chance.uniform(-2, 2) for _ in range(num_ranks))


@pytest.mark.parametrize(
    ("num_items", "weights", "expected"),
    [
        (24, (2, 1), (16, 8)),
        (24, (3, 1, 2, 2), (9, 3, 6, 6)),
        (777, (3, 1, 2, 2), (292, 97, 194, 194)),
        (7, (1, 1, 1), (3, 2, 2)),
        (1, (1, 1), (1, 0)),
        (0, (1, 5), (0, 0)),
    ],
)
def test_items_are_shared_in_proportion(num_items, weights, expected):
    assert proportional(num_items, weights) == expected


def test_shares_sum_exactly_and_keep_the_minimum_and_the_order_of_speeds():
    for chance in cases():
        num_ranks = chance.randint(1, 9)
        minimum = chance.randint(0, 3)
        num_items = minimum * num_ranks + chance.choice([0, 1, 5, 24, 256, 4096, 66048])
        weights = random_weights(chance, num_ranks)
        shares = proportional(num_items, weights, minimum=minimum)
        assert sum(shares) == num_items
        assert min(shares) >= minimum
        by_weight = [shares[i] for i in sorted(range(num_ranks), key=lambda i: weights[i])]
        assert by_weight == sorted(by_weight)


def test_without_a_minimum_no_share_is_off_by_a_whole_item():
    for chance in cases():
        num_items, num_ranks = chance.randint(0, 5000), chance.randint(1, 9)
        weights = random_weights(chance, num_ranks)
        for share, weight in zip(proportional(num_items, weights), weights, strict=True):
            assert abs(share - num_items * weight / sum(weights)) < 1


@pytest.mark.parametrize("weight", [1, 0.1, 1 / 3, 7e9])
@pytest.mark.parametrize("num_ranks", range(1, 10))
@pytest.mark.parametrize("num_items", [0, 1, 24, 257, 1021, 4096, 4098])
def test_equal_weights_share_evenly(num_items, num_ranks, weight):
    assert proportional(num_items, (weight,) * num_ranks) == shard_sizes(num_items, num_ranks)


def test_equal_weights_give_what_the_even_split_gives():
    for chance in cases():
        num_ranks = chance.randint(1, 8)
        sizes = {
            "num_text_tokens": chance.randint(num_ranks, 600),
            "num_image_tokens": chance.randint(num_ranks, 5000),
            "num_reference_tokens": chance.choice([0, 0, 1, 37, 4096]),
            "num_heads": chance.choice([1, 24, 32, 48]),
        }
        weight = chance.choice([1, 0.1, 1 / 3, 7e9])
        shares = weighted_shares(**sizes, weights=(weight,) * num_ranks)
        text, image = sizes["num_text_tokens"], sizes["num_image_tokens"]
        whole = text + image + sizes["num_reference_tokens"]
        assert shares.text == shard_sizes(text, num_ranks)
        assert shares.heads == shard_sizes(sizes["num_heads"], num_ranks)
        if min(map(sum, zip(shares.image, shares.reference, strict=True))) > 1:
            assert shares.joint == shard_sizes(whole, num_ranks)


def test_every_rank_holds_text_and_image_and_nothing_is_lost():
    for chance in cases():
        num_ranks = chance.randint(1, 8)
        text, image = chance.randint(num_ranks, 40), chance.randint(num_ranks, 300)
        references = chance.choice([0, 1, 40, 3000])
        shares = weighted_shares(
            num_text_tokens=text,
            num_image_tokens=image,
            num_reference_tokens=references,
            num_heads=24,
            weights=random_weights(chance, num_ranks),
        )
        assert sum(shares.text) == text
        assert sum(shares.image) == image
        assert sum(shares.reference) == references
        assert sum(shares.heads) == 24
        assert min(shares.text) >= 1
        assert min(shares.image) >= 1
        assert min(shares.reference) >= 0


def test_rounding_leaves_no_rank_without_an_image_token():
    sizes = {"num_text_tokens": 9, "num_image_tokens": 6, "num_reference_tokens": 3}
    shares = weighted_shares(**sizes, num_heads=4, weights=(1,) * 5)
    assert sorted(shares.image) == [1, 1, 1, 1, 2]
    assert sum(shares.reference) == 3


def test_a_rank_of_twice_the_speed_gets_twice_the_sequence():
    shares = weighted_shares(
        num_text_tokens=256, num_image_tokens=4096, num_heads=24, weights=(2, 1)
    )
    assert shares.joint == (2901, 1451)
    assert shares.heads == (16, 8)


@pytest.mark.parametrize("sizes", [(1, 4096), (256, 1)])
def test_fewer_tokens_than_ranks_is_an_error_with_the_numbers(sizes):
    text, image = sizes
    with pytest.raises(PlanError, match=rf"{text} text tokens and {image} image tokens among 2"):
        weighted_shares(num_text_tokens=text, num_image_tokens=image, num_heads=4, weights=(1, 2))


@pytest.mark.parametrize("weights", [(), (1, 0), (1, -1)])
def test_weights_that_are_not_above_0_are_an_error(weights):
    with pytest.raises(PlanError, match=r"Cannot share 10 items by weights"):
        proportional(10, weights)


def test_too_few_items_for_the_minimum_is_an_error():
    with pytest.raises(PlanError, match=r"3 items by weights \(1, 1\), at least 2 each"):
        proportional(3, (1, 1), minimum=2)


def test_even_the_slowest_rank_keeps_enough_to_be_measured():
    moved = moved_weights((1, 1), (1, 1e-6), damping=1)
    assert moved[1] == pytest.approx(SMALLEST_PART / 2, rel=0.1)


def test_a_move_goes_the_damped_part_of_the_way():
    moved = moved_weights((1, 1), (4, 1))
    assert moved[0] / moved[1] == pytest.approx(4**DAMPING)


def test_moving_all_the_way_gives_the_speeds_and_not_at_all_the_weights():
    assert moved_weights((1, 1), (3, 1), damping=1) == pytest.approx((0.75, 0.25))
    assert moved_weights((3, 1), (1, 1), damping=0) == pytest.approx((0.75, 0.25))
    assert min(moved_weights((1, 1), (1e9, 1), damping=1)) == pytest.approx(SMALLEST_PART / 2, 0.1)


@pytest.mark.parametrize("ring_degree", [1, 2, 3, 6])
def test_equal_weights_share_heads_in_a_ring_evenly(ring_degree):
    sizes = {"num_text_tokens": 77, "num_image_tokens": 500, "num_heads": 7}
    shares = weighted_shares(**sizes, weights=(0.3,) * 6, ring_degree=ring_degree)
    assert shares.heads == shard_sizes(7, 6 // ring_degree)
