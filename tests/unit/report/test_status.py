"""Counts become a report, and a report becomes JSON."""

from __future__ import annotations

import json
import time

import pytest
from rig.status_schema import faults

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.report.schema import Status
from comfy_xdit_patch.report.status import WINDOW_S, RunCounts, Totals


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


def test_steps_that_auto_gave_to_one_gpu_did_not_fall_back():
    report = RunCounts(chose_one=4, parallel_seconds=[1.0] * 2).report(ranks=2)
    assert (report.steps, report.steps_chose_one_gpu, report.steps_fell_back) == (6, 4, 0)


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


def test_runs_of_which_a_step_had_transfers_in_8_bits_are_approximate():
    runs = RunCounts(plan=ParallelPlan(ulysses=2), transfer_dtype="fp8", parallel_seconds=[1.0])
    runs.add(RunCounts(plan=ParallelPlan(ring=2), parallel_seconds=[1.0]))
    report = runs.report(ranks=2)
    assert (report.plan, report.transfer_dtype, report.is_exact) == ("ring=2", "fp8", False)
    assert report.steps_warm_up == 0


def test_totals_are_counted_with_their_reasons_and_remedies():
    totals = Totals(runs=1, steps_parallel=20, bytes_to_workers=1)
    totals.fall_backs["a worker was lost"] += 3
    totals.fall_backs["a reason that no page explains"] += 1
    totals.steps_chose_one += 5
    facts = totals.of_status()
    assert (facts["totals"].steps_fell_back, facts["totals"].steps_chose_one_gpu) == (4, 5)
    lost, unknown = facts["fell_back"]
    assert (lost.reason, lost.count) == ("a worker was lost", 3)
    assert "docs/troubleshooting.md" in lost.remedy
    assert unknown.remedy is None
    status = Status(state="ready", **facts)
    assert faults(json.loads(json.dumps(status.to_dict()))) == []
    assert status.short()["steps_fell_back"] == 4


def test_other_settings_begin_with_nothing_that_was_last_and_with_all_counts():
    totals = Totals(steps_parallel=3, weights=(2, 1), residency=["a line"])
    totals.ran(1, num_forwards=3, step_s=0.2, busy_s=0.1)
    totals.failed("an error")
    anew = totals.begin_anew()
    assert anew.counts().steps_parallel == 3
    facts = anew.of_status()
    assert (facts["weights"], facts["residency"], facts["last_error"]) == ([], [], None)
    rank = anew.of_rank(1, time.monotonic(), None)
    assert (rank["forwards"], rank["step_s"]) == (0, None)
    assert rank["busy_total_s"] == pytest.approx(0.1)


def test_a_rank_is_busy_for_the_part_of_the_last_seconds_in_which_it_computed():
    totals = Totals()
    for _ in range(10):
        totals.ran(0, num_forwards=1, step_s=1.0, busy_s=0.5)
    now_s = time.monotonic()
    assert totals.of_rank(0, now_s, None)["busy_share"] == pytest.approx(5.0 / WINDOW_S)
    assert totals.of_rank(0, now_s + WINDOW_S + 1, None)["busy_share"] == 0
    assert totals.of_rank(0, now_s + WINDOW_S + 1, None)["busy_total_s"] == pytest.approx(5.0)


def test_calls_of_a_process_before_are_not_those_of_a_new_one():
    totals = Totals()
    totals.ran(0, num_forwards=7, step_s=1.0, busy_s=0.5)
    assert totals.of_rank(0, 0.0, since_s=0.0)["forwards"] == 7
    assert totals.of_rank(0, 0.0, since_s=time.monotonic())["forwards"] == 0
