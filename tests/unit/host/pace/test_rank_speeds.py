"""Weights belong to a crew of ranks; a run may hold on to those that it began with."""

from __future__ import annotations

import types

import pytest

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pace.rank_speeds import CrewBalance
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.report.status import Totals

IMAGE = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=4096, num_heads=24)


CREW = types.SimpleNamespace(
    world_size=2, joined={}, workers=[types.SimpleNamespace(device=Device("cpu"))] * 2
)


@pytest.fixture
def totals():
    return Totals()


def balance_of(totals, mode="adaptive"):
    return CrewBalance(CREW, mode=mode, totals=totals)


def plan_with(weights):
    return ParallelPlan(ulysses=2, weights=weights)


def measure(balance, num_calls, run=None, busy_s=(1.0, 2.0), **more):
    run = run or Run()
    for _ in range(num_calls):
        plan = plan_with(balance.weights(run))
        balance.measured(plan, IMAGE, busy_s, model=1, replan=plan_with, **more)
    return run


def test_what_ranks_were_busy_for_becomes_weights_and_status(totals):
    balance = balance_of(totals)
    run = measure(balance, 6)
    assert balance.weights(run)[0] > 1.5 * balance.weights(run)[1]
    assert (totals.weights, totals.share_changes) == (balance.weights(run), 1)


def test_nothing_is_learned_from_steps_of_which_a_cpu_set_the_pace(totals):
    balance = balance_of(totals)
    assert balance.weights(measure(balance, 20, is_launch_bound=True)) == ()
    assert balance.is_at_rest, "auto could never compare such ranks with one GPU"
    measure(balance, 1)
    assert not balance.is_at_rest
    assert balance.weights(measure(balance, 6)) != ()


def test_a_run_holds_its_weights_while_others_follow(totals):
    balance = balance_of(totals)
    run = Run()
    balance.hold(run, balance.weights(run))
    measure(balance, 6, run)
    assert balance.weights(run) == ()
    assert balance.weights(Run()) != ()


def test_new_workers_begin_with_even_shares(totals):
    measure(balance_of(totals), 6)
    assert balance_of(totals).weights(Run()) == ()
    assert (totals.weights, totals.share_changes) == ((), 1)


def test_a_rank_that_said_nothing_is_no_measurement(totals):
    measure(balance_of(totals), 20, busy_s=(1.0, 0.0))
    assert totals.share_changes == 0


def test_what_others_use_is_looked_at_once_in_a_run(totals, monkeypatch):
    looks = iter([(1.0, 0.5), (1.0, 0.5), (1.0, 1.0)])
    balance = balance_of(totals, "least_loaded")
    monkeypatch.setattr(balance._left_over, "parts", lambda: next(looks))
    run = Run()
    assert [balance.weights(run) for _ in range(3)] == [(1000, 500)] * 3
    assert balance.weights(Run()) == (1000, 500)
    assert balance.weights(Run()) == ()
    assert totals.share_changes == 2
