"""Counts become a report, and a report becomes JSON."""

from __future__ import annotations

import json

import pytest

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.report.status import RunCounts, Totals


def test_a_run_without_steps_has_none():
    report = RunCounts().report(ranks=4)
    assert (report.steps, report.steps_parallel, report.steps_fell_back) == (0, 0, 0)
    assert report.ms_per_step is None
    assert (report.strategy, report.plan, report.ranks) == (None, None, 1)


def test_time_per_step_is_the_median_over_parallel_steps():
    counts = RunCounts(plan=ParallelPlan(ulysses=2), parallel_seconds=[9.0, 0.060, 0.062])
    report = counts.report(ranks=2)
    assert report.ms_per_step == pytest.approx(62)
    assert (report.steps, report.ranks, report.plan) == (3, 2, "ulysses=2")
    assert report.strategy == "ulysses"


def test_steps_that_fell_back_are_counted_by_reason():
    counts = RunCounts(plan=ParallelPlan(ulysses=2), parallel_seconds=[1.0])
    counts.fall_backs["a ControlNet is active"] += 2
    counts.fall_backs["a worker was lost"] += 1
    report = counts.report(ranks=2)
    assert (report.steps, report.steps_parallel, report.steps_fell_back) == (4, 1, 3)
    assert report.fall_back_reasons == {"a ControlNet is active": 2, "a worker was lost": 1}


def test_a_run_on_one_gpu_claims_one_rank_and_no_strategy():
    counts = RunCounts()
    counts.fall_backs["a worker was lost"] += 1
    report = counts.report(ranks=8)
    assert (report.ranks, report.strategy, report.ms_per_step) == (1, None, None)


def test_a_report_does_not_change_with_the_counts_it_was_made_of():
    counts = RunCounts(parallel_seconds=[1.0])
    counts.fall_backs["a"] += 1
    report = counts.report(ranks=2)
    counts.fall_backs["a"] += 1
    assert report.fall_back_reasons == {"a": 1}


def test_a_run_of_an_approximate_plan_says_so_and_how_many_of_its_steps_were_exact():
    plan = ParallelPlan(pipefusion=2)
    report = RunCounts(plan=plan, parallel_seconds=[1.0] * 5, warm_ups=1).report(ranks=2)
    assert (report.is_exact, report.steps_warm_up) == (False, 1)
    exact = RunCounts(plan=ParallelPlan(ulysses=2), parallel_seconds=[1.0]).report(ranks=2)
    assert (exact.is_exact, exact.steps_warm_up) == (True, 0)


@pytest.mark.parametrize("has_run", [False, True])
def test_totals_are_json_with_these_keys(has_run):
    totals = Totals(runs=1, steps_parallel=20, bytes_to_workers=1, bytes_from_workers=2)
    totals.fall_backs["a worker was lost"] += 3
    totals.bytes_between_ranks = 5
    if has_run:
        totals.last_run = RunCounts(parallel_seconds=[1.0]).report(ranks=2)
    body = json.loads(json.dumps(totals.to_dict()))
    assert body["steps_fell_back"] == 3
    assert body["bytes"] == {"to_workers": 1, "from_workers": 2, "between_ranks": 5}
    assert set(body) == {
        "runs",
        "steps_parallel",
        "steps_fell_back",
        "fall_back_reasons",
        "bytes",
        "bytes_weights",
        "controls",
        "decodes",
        "steps_gathered",
        "steps_skipped",
        "steps_measured",
        "loads",
        "gave_way",
        "weights_verified",
        "residency",
        "last_loss_unix_s",
        "last_step_s",
        "balance",
        "last_run",
        "last_error",
    }
    if has_run:
        assert body["last_run"]["steps_parallel"] == 1
    else:
        assert body["last_run"] is None
