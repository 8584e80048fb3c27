"""Weights are learned from busy seconds, changed only for a gain, and left alone by noise.

Ranks are simulated: their busy seconds follow from the shares that a real plan gives them.
"""

from __future__ import annotations

from functools import partial

import pytest
from rig.unequal import IMAGE, SPEEDS, Ranks

from comfy_xdit_patch.planning.balance import (
    FEW_CALLS,
    MANY_CALLS,
    MOST_CALLS,
    Balance,
    as_weights,
    work_parts,
)
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.strategy import parse_strategy

TWO_ROWS = Workload(batch_size=2, num_text_tokens=256, num_image_tokens=4096, num_heads=24)


@pytest.mark.parametrize(
    ("plan", "workload"),
    [
        (ParallelPlan(), IMAGE),
        (ParallelPlan(ulysses=3, ring=2), IMAGE),
        (ParallelPlan(batch=2, ulysses=2, weights=(3, 1, 2, 2)), TWO_ROWS),
        (ParallelPlan(ulysses=5, weights=(1, 2, 3, 4, 5)), IMAGE),
    ],
)
def test_the_parts_of_a_calls_work_are_the_whole(plan, workload):
    assert sum(work_parts(plan, workload)) == pytest.approx(1)


def test_a_rank_with_one_head_more_has_more_work():
    parts = work_parts(ParallelPlan(ulysses=7), IMAGE)
    assert parts[0] / parts[6] == pytest.approx(1 + 0.19 * (4 / 3 - 1), abs=0.02)


@pytest.mark.parametrize("mode", ["adaptive", "least_loaded"])
@pytest.mark.parametrize("strategy", ["auto", "ulysses", "ring"])
def test_a_half_speed_rank_is_balanced_in_a_few_calls(mode, strategy):
    ranks = Ranks(Balance(mode, 2), 1, 0.5, strategy=parse_strategy(strategy), noise=0.02)
    ranks.run(1 + FEW_CALLS)
    assert ranks.efficiency == pytest.approx(2 / 3, abs=0.03)
    ranks.run(2)
    assert ranks.balance.num_changes == 1
    assert ranks.efficiency >= 0.93


@pytest.mark.parametrize(
    ("speeds", "strategy"),
    [
        ((1, 0.5, 1), "auto"),
        ((1, 1, 1, 0.5), "usp"),
        ((2, 1, 0.7, 0.4), "ring"),
        ((1, 0.8), "auto"),
    ],
)
def test_ranks_of_any_speeds_reach_nine_tenths_of_the_ideal(speeds, strategy):
    ranks = Ranks(
        Balance("adaptive", len(speeds)), *speeds, strategy=parse_strategy(strategy), noise=0.02
    )
    assert ranks.run(30).efficiency >= 0.9


@pytest.mark.parametrize("speeds", SPEEDS)
def test_nine_tenths_of_the_ideal_after_nine_calls(speeds):
    assert Ranks(Balance("adaptive", len(speeds)), *speeds).run(10).efficiency >= 0.9


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.04])
def test_equal_ranks_keep_even_shares(num_ranks, noise):
    changes = 0
    for seed in range(3):
        balance = Balance("adaptive", num_ranks)
        Ranks(balance, *[1.0] * num_ranks, noise=noise, seed=seed).run(100)
        changes += balance.num_changes
    assert changes == 0


def test_a_single_disturbed_call_changes_nothing():
    ranks = Ranks(Balance("adaptive", 2), 1, 1).run(5)
    ranks.speeds[1] = 0.3
    ranks.run(1).speeds[1] = 1
    ranks.run(20)
    assert ranks.balance.num_changes == 0


def test_disturbed_calls_do_not_hide_a_gain_for_long():
    ranks = Ranks(Balance("adaptive", 2), 1, 0.34, noise=0.02).run(6)
    assert ranks.balance.num_changes == 1
    for speed in (0.15, 1.2, 0.2, 0.9):  # what else the machine does
        ranks.speeds[1] = speed
        ranks.run(1)
    ranks.speeds[1] = 0.46
    ranks.run(12)
    assert ranks.balance.num_changes == 2
    assert ranks.efficiency >= 0.95


def test_a_rank_that_recovers_gets_even_shares_back():
    ranks = Ranks(Balance("adaptive", 2), 1, 0.5).run(10)
    assert ranks.balance.weights
    ranks.speeds[1] = 1
    ranks.run(2 * MANY_CALLS)
    assert ranks.balance.weights == ()
    assert ranks.efficiency == pytest.approx(1, abs=0.01)


def test_a_cost_that_no_share_divides_does_not_throw_the_balance_over():
    ranks = Ranks(Balance("adaptive", 2), 1, 0.5, fixed_s=0.2).run(60)
    assert ranks.efficiency >= 0.95


def test_work_that_weighs_otherwise_than_thought_costs_one_trial():
    """Five heads on two equal ranks, where attention takes twice what FLOPs say."""

    class SlowAttention(Ranks):
        def busy(self, plan, workload):
            shares = plan.sequence_shares(
                0, num_text_tokens=256, num_image_tokens=4096, num_heads=5
            )
            return [
                0.6 * tokens / 4352 + 0.4 * heads / 5
                for tokens, heads in zip(shares.joint, shares.heads, strict=True)
            ]

    workload = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=4096, num_heads=5)
    ranks = SlowAttention(Balance("adaptive", 2), 1, 1).run(200, workload)
    even = ranks.times[0]
    assert ranks.balance.num_changes in (0, 2)
    assert ranks.times[-100:] == [pytest.approx(even)] * 100
    assert sum(time > even for time in ranks.times) <= MANY_CALLS + 1


def test_a_balance_is_at_rest_when_no_large_change_is_to_come():
    assert Balance("even", 2).is_at_rest
    ranks = Ranks(Balance("adaptive", 2), 1, 1).run(FEW_CALLS)
    assert not ranks.balance.is_at_rest
    assert ranks.run(1).balance.is_at_rest
    assert ranks.run(50).balance.is_at_rest
    ranks = Ranks(Balance("adaptive", 2), 1, 0.5).run(1 + FEW_CALLS)
    assert not ranks.balance.is_at_rest, "shares have just changed"
    assert ranks.run(2 + FEW_CALLS).balance.is_at_rest
    weighted = Ranks(Balance("weighted", 2), 1, 1).run(MANY_CALLS)
    assert not weighted.balance.is_at_rest
    assert weighted.run(1).balance.is_at_rest


def test_two_rows_are_shared_by_tokens_once_the_ranks_are_known_to_be_unequal():
    ranks = Ranks(Balance("adaptive", 2), 1, 0.5)
    assert ranks.plan(TWO_ROWS, ()).name == "batch=2"
    ranks.run(6, TWO_ROWS)
    assert ranks.plan(TWO_ROWS, ranks.balance.weights).name == "ulysses=2"
    assert ranks.efficiency >= 0.95


def test_rows_that_cannot_be_shared_otherwise_change_nothing():
    ranks = Ranks(Balance("adaptive", 2), 1, 0.5, strategy=parse_strategy("batch"))
    assert ranks.run(50, TWO_ROWS).balance.num_changes == 0


def test_weighted_measures_once():
    ranks = Ranks(Balance("weighted", 2), 1, 0.5).run(1 + MANY_CALLS)
    assert ranks.balance.weights == (1000, 500)
    ranks.speeds[1] = 1
    ranks.run(MOST_CALLS)
    assert ranks.balance.weights == (1000, 500)
    equal = Ranks(Balance("weighted", 2), 1, 1, noise=0.02).run(1 + MANY_CALLS)
    equal.speeds[1] = 0.5
    assert equal.run(MOST_CALLS).balance.num_changes == 0


def test_even_measures_nothing():
    assert Ranks(Balance("even", 2), 1, 0.1).run(20).balance.weights == ()


def test_the_first_call_of_a_kind_is_not_counted():
    balance = Balance("adaptive", 2)
    ranks = Ranks(balance, 1, 0.2)
    for size in range(64, 164):  # each call of another size
        ranks.run(1, Workload(1, size, size, 24))
    assert balance.num_changes == 0


@pytest.mark.parametrize("busy", [(0.0, 1.0), (-1.0, 1.0), (1e-9, 1.0), (1e300, 1.0)])
def test_busy_seconds_that_make_no_sense_are_not_counted(busy):
    balance = Balance("adaptive", 2)
    plan = ParallelPlan(ulysses=2)
    for _ in range(20):
        replan = partial(ParallelPlan, 2, 1, 2, 1, 1, 1)
        assert not balance.measured(plan, IMAGE, busy, kind=1, replan=replan)
    assert balance.weights == ()


def test_shares_follow_what_others_use_before_anything_is_measured():
    balance = Balance("least_loaded", 2)
    assert balance.follow((1.0, 0.5))
    assert balance.weights == (1000, 500)
    assert not balance.follow((1.0, 0.55)), "about the same"
    assert balance.follow((1.0, 1.0))
    assert balance.weights == ()


def test_a_load_that_was_measured_is_not_counted_twice():
    ranks = Ranks(Balance("least_loaded", 2), 1, 0.5).run(6)
    ranks.balance.learned_under((1.0, 0.5))
    weights = ranks.balance.weights
    assert not ranks.balance.follow((1.0, 0.5))
    assert ranks.balance.weights == weights
    assert ranks.balance.follow((1.0, 1.0))
    assert ranks.balance.weights == (), "what is left when the other program ends"


def test_speeds_that_are_about_equal_are_no_weights():
    assert as_weights((1.0, 1.04)) == ()
    assert as_weights((0.3, 0.1, 1e-9)) == (1000, 333, 1)
