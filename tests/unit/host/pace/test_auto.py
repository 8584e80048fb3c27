"""Whose turn it is in ``auto``, what a verdict does to calls, and when it is doubted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.pace import auto as auto_module
from comfy_xdit_patch.host.pace.auto import ONE_IS_FASTER, Auto, Kind
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.strategy import AUTO, parse_strategy
from comfy_xdit_patch.planning.verdict import NUM_RUNS, NUM_WATCHED, ONE

WORKLOAD = Workload(1, 256, 4096, num_heads=24)
ULYSSES, RING, TENSOR = "ulysses=4", "ulysses=2,ring=2", "ulysses=2,tensor=2"
PLANS = {
    AUTO: ParallelPlan(ulysses=4),
    parse_strategy(RING): ParallelPlan(ulysses=2, ring=2),
    parse_strategy(TENSOR): ParallelPlan(ulysses=2, tensor=2),
}
USUAL = {AUTO: PLANS[AUTO]}
MOST_STEPS = 40


class Driver:
    """Calls of one model, each of which takes what ``seconds`` has for its way."""

    def __init__(self, seconds: dict[str, float]) -> None:
        device = SimpleNamespace(is_cpu=True)
        pool = SimpleNamespace(devices=[device] * 4, world_size=4, device_word="CPU ranks")
        settings = SimpleNamespace(strategy=AUTO, strict=False, captures=False)
        self.auto = Auto(settings, pool)  # type: ignore[arg-type]
        self.flux = torch.nn.Linear(2, 2)
        self.seconds = seconds
        self.run = Run()

    def turn(self, plans=PLANS, *, is_plain=True, is_at_rest=True, can_time_one=True):
        return self.auto.turn(
            SimpleNamespace(module=self.flux, model=None, workload=WORKLOAD, run=self.run),
            plans,
            is_plain=is_plain,
            is_at_rest=is_at_rest,
            can_time_one=lambda: can_time_one,
        )

    def step(self, plans=PLANS, **options):
        """Make a call; return its way."""
        turn = self.turn(plans, **options)
        if isinstance(turn, Refusal):
            assert turn == ONE_IS_FASTER
            return ONE
        way = ONE if turn.kind and turn.kind.is_one else plans[turn.strategy].name
        if turn.kind is not None:
            assert turn.kind.way == way
            self.auto.took(turn.kind, self.seconds[way])
        return way

    def image(self, plans=PLANS, **options):
        self.run = Run()
        return [self.step(plans, **options) for _ in range(MOST_STEPS)]

    @property
    def verdict(self):
        return self.auto.records[self.auto._case(self.flux, WORKLOAD, None)].verdict


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


SECONDS = {ULYSSES: 1.0, RING: 0.8, TENSOR: 0.9, ONE: 1.9}


@pytest.mark.parametrize("fastest", [ULYSSES, RING, TENSOR, ONE])
def test_the_fastest_way_is_taken_from_then_on_and_by_the_next_process(fastest):
    seconds = SECONDS | {fastest: 0.5}
    driver = Driver(seconds)
    ways = driver.image()
    assert {*ways} == {*SECONDS}
    assert driver.image() == [fastest] * MOST_STEPS
    assert Driver(seconds).image() == [fastest] * MOST_STEPS


def test_a_plan_that_cuts_weights_is_tried_last_and_without_a_break():
    ways = Driver(SECONDS).image()
    first = ways.index(TENSOR)
    assert {*ways[:first]} == {ULYSSES, RING, ONE}
    assert {*ways[first + ways[first:].count(TENSOR) :]} == {RING}


def test_calls_whose_time_tells_nothing_follow_the_verdict_with_which_their_run_began():
    driver = Driver(SECONDS | {ONE: 0.5})
    driver.run = Run()
    for _ in range(MOST_STEPS):
        driver.step()
        assert driver.step(is_plain=False) == ULYSSES
    assert driver.verdict.taken == ONE
    driver.run = Run()
    assert driver.step(is_plain=False) == ONE


def test_a_call_that_cannot_have_the_plan_that_was_taken_has_the_usual_one():
    driver = Driver(SECONDS)
    driver.image()
    assert driver.image(USUAL) == [ULYSSES] * MOST_STEPS
    assert driver.verdict.taken == RING, "nothing of it was measured again"


def test_where_one_cannot_be_timed_plans_are_compared_and_one_when_it_can():
    driver = Driver(SECONDS | {ONE: 0.5})
    assert ONE not in driver.image(can_time_one=False)
    assert driver.image(can_time_one=False) == [RING] * MOST_STEPS
    assert ONE in driver.image()
    assert driver.image(can_time_one=False) == [ONE] * MOST_STEPS


def test_a_single_plan_is_not_tried_where_one_cannot_be_timed():
    driver = Driver(SECONDS)
    driver.run = Run()
    turn = driver.turn(USUAL, can_time_one=False)
    assert turn.kind is None
    assert driver.verdict is None


def test_one_has_a_second_look_after_many_runs():
    seconds = SECONDS | {ONE: 0.5}
    driver = Driver(seconds)
    driver.image()
    seconds[ULYSSES] = 0.2
    for number in range(NUM_RUNS - 1):
        assert {*driver.image()} == {ONE}, number
    driver = Driver(seconds)  # Runs are counted in the file.
    assert ULYSSES in driver.image()
    assert {*driver.image()} == {ULYSSES}


def test_one_has_a_second_look_after_a_day(monkeypatch):
    driver = Driver(SECONDS | {ONE: 0.5})
    driver.image()
    assert {*driver.image()} == {ONE}
    now = auto_module.time.time()
    monkeypatch.setattr(auto_module.time, "time", lambda: now + 25 * 3600)
    assert {*driver.image(can_time_one=False)} == {ONE}, "the ranks alone tell nothing"
    assert {*driver.image()} == {*SECONDS}
    assert {*driver.image()} == {ONE}


def test_before_a_second_look_the_ranks_run_until_their_shares_are_at_rest():
    driver = Driver(SECONDS | {ONE: 0.5})
    driver.image()
    assert {*driver.image(is_at_rest=False)} == {ONE}
    for _ in range(NUM_RUNS - 2):
        driver.image()
    driver = Driver(SECONDS | {ONE: 0.5})
    driver.run = Run()
    assert [driver.step(is_at_rest=False) for _ in range(3)] == [ULYSSES] * 3
    assert driver.step(is_plain=False) == ONE
    assert driver.step(is_at_rest=False, can_time_one=False) == ONE
    assert {*(driver.step() for _ in range(MOST_STEPS))} == {*SECONDS}


def test_ranks_that_become_slower_than_one_was_are_measured_again():
    driver = Driver(seconds := dict(SECONDS))
    driver.image()
    seconds[RING] = 2.0
    driver.run = Run()
    slow = NUM_WATCHED // 2 + 1
    assert [driver.step() for _ in range(slow)] == [RING] * slow
    assert {*(driver.step() for _ in range(MOST_STEPS))} == {*SECONDS}
    assert driver.verdict.taken == TENSOR


def test_a_few_slow_steps_change_nothing():
    driver = Driver(seconds := dict(SECONDS))
    driver.image()
    for slow in (True, False, True, False, False) * 3:
        seconds[RING] = 5.0 if slow else 0.8
        assert driver.step() == RING


def test_sizes_models_and_compiled_ones_are_measured_by_themselves():
    driver = Driver(SECONDS)
    patcher = SimpleNamespace(model_options={"torch_compile_kwargs": {}})
    cases = {
        driver.auto._case(flux, workload, base_model)
        for flux in (driver.flux, torch.nn.Linear(3, 3))
        for workload in (WORKLOAD, replace(WORKLOAD, num_image_tokens=16384))
        for base_model in (SimpleNamespace(), SimpleNamespace(current_patcher=patcher))
    }
    assert len(cases) == 8


@pytest.mark.parametrize(
    ("strategy", "strict", "is_on"), [("auto", False, True), ("auto", True, False), ("ring", 0, 0)]
)
def test_a_named_strategy_and_strict_mode_measure_nothing(strategy, strict, is_on):
    settings = SimpleNamespace(strategy=parse_strategy(strategy), strict=strict, captures=False)
    assert Auto(settings, SimpleNamespace()).is_on == bool(is_on)  # type: ignore[arg-type]


def test_what_the_gpu_has_to_do_before_a_step_is_not_counted_for_it(monkeypatch):
    """5 s of it are left, and the step takes 2 s; launching takes no time."""
    now, queued = [0.0], [5.0]

    def synchronize(_):
        now[0] += queued.pop() if queued else 0

    def compute():
        queued.append(2.0)
        return "a step"

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(auto_module.time, "perf_counter", lambda: now[0])
    took = []
    auto = Auto.__new__(Auto)
    auto.took = lambda kind, seconds: took.append(seconds)  # type: ignore[method-assign]
    kind = Kind(None, None, ONE)  # type: ignore[arg-type]
    assert auto.time_one(kind, compute, torch.device("cuda:0")) == "a step"
    assert took == [2.0]
