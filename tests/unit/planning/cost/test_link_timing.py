"""Groupings of ranks, lines through times, links made of them."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.planning.cost.candidate import candidates
from comfy_xdit_patch.planning.cost.link_timing import (
    Timing,
    fit,
    groupings,
    groups_of,
    links_of,
    measurements,
    name_of,
    slowest,
)
from comfy_xdit_patch.planning.cost.machine import Gpu, Machine

SIZES = (1 << 16, 1 << 20, 1 << 24)
GPU = Gpu("card", 1 << 34, 1e14, 1e14, 0, 1e12, 2e10)


def made(world_size, timing_of):
    timings = {m: timing_of(*m) for m in measurements(world_size)}
    links = links_of(world_size, timings, lambda a, b: "pcie")
    return Machine(gpus=(GPU,) * world_size, links=links, are_links_timed=True)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6, 8, 12, 16])
def test_every_group_of_every_plan_of_all_ranks_is_a_grouping(world_size):
    timed = {tuple(groups_of(world_size, grouping)) for grouping in groupings(world_size)}
    for plan in candidates(world_size):
        if plan.world_size == world_size:
            for axis, degree in plan.degrees.items():
                if degree > 1:
                    assert tuple(plan.groups(axis)) in timed, (plan.name, axis)


@pytest.mark.parametrize(("world_size", "number"), [(1, 0), (2, 1), (3, 1), (4, 3), (6, 5), (8, 6)])
def test_there_are_few_groupings(world_size, number):
    assert len(groupings(world_size)) == number


def test_groupings_are_named_in_messages():
    assert [name_of(*m) for m in measurements(2)] == [
        "all_to_all 2 1",
        "pass_on 2 1",
        "all_gather 2 1",
    ]
    assert measurements(1) == []


@pytest.mark.parametrize("latency_s", [0.0, 8e-6, 300e-6])
@pytest.mark.parametrize("bytes_per_s", [0.6e9, 12e9, 200e9])
def test_a_line_is_found_again(latency_s, bytes_per_s):
    true = Timing(latency_s, bytes_per_s)
    found = fit([(size, true.seconds(size)) for size in SIZES])
    assert found.latency_s == pytest.approx(latency_s, abs=1e-9)
    assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-3)


def test_noise_moves_latency_and_bandwidth_by_no_more_than_itself():
    true = Timing(20e-6, 22e9)
    noisy = [(size, true.seconds(size) * f) for size, f in zip(SIZES, (1.1, 0.9, 1.1), strict=True)]
    found = fit(noisy)
    assert found.latency_s == pytest.approx(20e-6, rel=0.2)
    assert found.bytes_per_s == pytest.approx(22e9, rel=0.2)


def test_times_below_the_line_through_the_origin_have_no_latency():
    found = fit([(1 << 16, 1e-6), (1 << 20, 50e-6), (1 << 24, 900e-6)])
    assert found == Timing(0.0, (1 << 24) / 900e-6)


def test_times_that_fall_with_the_size_still_give_a_rate():
    assert fit([(1 << 16, 2e-3), (1 << 20, 1e-3)]) == Timing(0.0, (1 << 20) / 1e-3)
    assert fit([(1 << 16, 1e-3)]) == Timing(0.0, (1 << 16) / 1e-3)


def test_the_slowest_rank_has_the_exchange_last():
    assert slowest([[[8, 1.0], [16, 5.0]], [[8, 3.0], [16, 4.0]]]) == [[8, 3.0], [16, 5.0]]


def test_a_machine_has_the_rate_of_each_grouping_where_smaller_groups_are_faster():
    rates = {(8, 1): 3e9, (4, 1): 10e9, (4, 2): 4e9, (2, 1): 20e9, (2, 2): 11e9, (2, 4): 5e9}
    machine = made(8, lambda form, grouping: Timing(1e-5 * grouping[0], rates[grouping]))
    for grouping, rate in rates.items():
        groups = groups_of(8, grouping)
        assert machine.all_to_all_s(groups, 1e9) == pytest.approx(1e9 / rate)
        assert machine.latency_s(groups) == pytest.approx(1e-5 * grouping[0])


def test_forms_are_kept_apart():
    rates = {"all_to_all": 10e9, "pass_on": 20e9, "all_gather": 15e9}
    latencies = {"all_to_all": 1e-5, "pass_on": 3e-5, "all_gather": 9.0}
    machine = made(4, lambda form, _: Timing(latencies[form], rates[form]))
    pairs, whole = groups_of(4, (2, 1)), groups_of(4, (4, 1))
    assert machine.all_to_all_s(pairs, 1e9) == pytest.approx(0.1)
    assert machine.ring_s(pairs, 1e9) == pytest.approx(0.05)
    assert machine.ring_s(whole, 1e9) == pytest.approx(1 / 15)
    assert machine.latency_s(whole) == 1e-5
    assert machine.step_s(whole) == 3e-5


def test_one_rank_has_no_links():
    assert len(made(1, lambda *_: None).links) == 1
