"""The order of measurements, and what follows from them, on simulated machines."""

from __future__ import annotations

import random

import pytest

from comfy_xdit_patch.planning.plan import Workload
from comfy_xdit_patch.planning.verdict import (
    DAY_S,
    MOST,
    NUM_RUNS,
    ONE,
    PATIENCE,
    USUAL,
    Pace,
    Trial,
    Verdict,
    size_class,
)

NUM_SEEDS = 10
NUM_IMAGES, NUM_STEPS = 10, 20
WARM_UP = 3.0
"""What the first step of a way in a run takes, in its later ones."""


def quiet(rng: random.Random) -> float:
    return 1 + abs(rng.gauss(0, 0.02))


def loaded(rng: random.Random) -> float:
    """Every fifth step comes while something else has the machine."""
    return (1 + abs(rng.gauss(0, 0.04))) * (rng.uniform(1.5, 4) if rng.random() < 0.2 else 1)


class Machine:
    """A trial on a machine on which the ways take so many seconds, and what it cost.

    ``steps`` are the ways of the trial's steps, ``cost`` is what all images took longer than by the
    fastest way, as a part of that, noise left out.
    """

    def __init__(self, seconds, noise, seed, *, num_steps=NUM_STEPS, apart=()):
        rng, trial, ways = random.Random(seed), Trial(), list(seconds)
        self.steps: list[str] = []
        self.verdict = None
        spent = 0.0
        for _ in range(NUM_IMAGES * NUM_STEPS // num_steps):
            trial.begin_run()
            warm = set()
            for _ in range(num_steps):
                if self.verdict is None and trial.due(ways, apart) is None:
                    self.verdict = trial.verdict(ways, 0.0)
                if self.verdict is not None:
                    spent += seconds[self.verdict.taken]
                    continue
                way = trial.due(ways, apart)
                trial.give(way)
                trial.took(way, seconds[way] * noise(rng) * (1 if way in warm else WARM_UP))
                warm.add(way)
                self.steps.append(way)
                spent += seconds[way]
        self.cost = spent / (min(seconds.values()) * NUM_IMAGES * NUM_STEPS) - 1

    @property
    def turns(self) -> str:
        return " ".join(self.steps)


def machines(seconds, noise, **options):
    return [Machine(seconds, noise, seed, **options) for seed in range(NUM_SEEDS)]


FAR_APART = [
    {"u": 1.0, ONE: 1.1},
    {"u": 1.1, ONE: 1.0},
    {"u": 1.0, ONE: 1.8},
    {"u": 1.5, ONE: 1.0},
    {"u": 1.0, "r": 1.1, ONE: 1.6},
    {"u": 1.15, "r": 1.0, ONE: 1.6},
    {"u": 1.3, "r": 1.2, ONE: 1.0},
    {"u": 1.0, ONE: 3.2},
    {"u": 1.15, "r": 1.0, "t": 1.3, ONE: 4.0},
]


@pytest.mark.parametrize("seconds", FAR_APART, ids=str)
def test_the_fastest_way_is_found_on_a_quiet_machine(seconds):
    taken = [machine.verdict.taken for machine in machines(seconds, quiet)]
    assert taken == [min(seconds, key=seconds.__getitem__)] * NUM_SEEDS


@pytest.mark.parametrize("seconds", FAR_APART, ids=str)
def test_the_fastest_way_is_found_nine_times_in_ten_on_a_loaded_machine(seconds):
    taken = [machine.verdict.taken for machine in machines(seconds, loaded)]
    assert taken.count(min(seconds, key=seconds.__getitem__)) >= 0.9 * NUM_SEEDS


@pytest.mark.parametrize("noise", [quiet, loaded])
@pytest.mark.parametrize(
    "seconds",
    [{"u": 1.0, ONE: 1.04}, {"u": 1.04, ONE: 1.0}, {"u": 1.04, "r": 1.0, "t": 1.03, ONE: 1.02}],
    ids=str,
)
def test_where_the_ways_differ_little_ten_images_take_a_twentieth_longer_at_most(seconds, noise):
    assert max(machine.cost for machine in machines(seconds, noise)) <= 0.05


@pytest.mark.parametrize("seconds", FAR_APART[:-1], ids=str)
def test_so_do_they_on_a_quiet_machine_where_the_ways_differ_much(seconds):
    assert max(machine.cost for machine in machines(seconds, quiet)) <= 0.05


@pytest.mark.parametrize("noise", [quiet, loaded])
@pytest.mark.parametrize("seconds", FAR_APART, ids=str)
def test_a_trial_has_so_many_steps_at_most(seconds, noise):
    most = len(seconds) * (1 + MOST)
    assert max(len(machine.steps) for machine in machines(seconds, noise)) <= most + len(seconds)


def test_each_way_warms_up_and_then_they_take_turns():
    turns = Machine({"u": 1.0, "r": 1.5, ONE: 1.9}, lambda rng: 1.0, 0).turns
    assert turns == "u u r r one one u r one u r one"


def test_a_way_that_is_far_behind_is_not_tried_again():
    turns = Machine({"u": 1.0, ONE: 4.0}, lambda rng: 1.0, 0).turns
    assert turns == "u u one one u one u"


def test_what_is_in_doubt_goes_on_for_the_two_that_are():
    machine = Machine({"u": 1.0, "r": 1.0, ONE: 1.9}, lambda rng: rng.uniform(1, 1.2), 0)
    assert machine.steps.count("u") == machine.steps.count("r") == 1 + MOST
    assert machine.steps.count(ONE) == 1 + USUAL


def test_ways_that_load_weights_anew_come_last_and_once():
    seconds = {"u": 1.0, "t": 1.0, ONE: 1.9}
    machine = Machine(seconds, lambda rng: rng.uniform(1, 1.2), 0, apart={"t"})
    first = machine.steps.index("t")
    assert machine.steps[first:] == ["t"] * (1 + USUAL)


@pytest.mark.parametrize(
    ("num_steps", "first_turns"), [(2, "u u one one u u one one"), (4, "u u one one u u one one")]
)
def test_short_runs_come_to_a_verdict_together(num_steps, first_turns):
    machine = Machine({"u": 1.0, ONE: 1.5}, quiet, 0, num_steps=num_steps)
    assert machine.turns.startswith(first_turns)
    assert machine.verdict.taken == "u"


def test_runs_of_one_step_stay_with_the_usual_plan():
    machine = Machine({"u": 1.0, ONE: 1.5}, quiet, 0, num_steps=1)
    assert {*machine.steps} == {"u"}
    assert machine.verdict is None


def test_a_way_of_which_no_time_comes_is_left_out():
    trial, asked = Trial(), []
    while (way := trial.due(("u", "r", ONE))) is not None:
        trial.give(way)
        asked.append(way)
        if way != "r":
            trial.took(way, 1.0)
    assert asked.count("r") == PATIENCE
    assert trial.verdict(("u", "r", ONE), 5.0) == Verdict({"u": Pace(1, 1), ONE: Pace(1, 1)}, 5.0)


def test_one_way_alone_is_no_verdict():
    trial = Trial()
    for _ in range(3):
        trial.took("u", 1.0)
    assert trial.verdict(("u", ONE), 0.0) is None


def verdict(**seconds):
    return Verdict(
        {way: Pace(fastest_s, 1.1 * fastest_s) for way, fastest_s in seconds.items()}, 9.0
    )


def test_the_fastest_is_taken_and_of_equals_one():
    assert verdict(u=1.0, r=0.9, one=2.0).taken == "r"
    assert verdict(u=1.0, one=1.0).taken == ONE
    assert verdict(u=1.0, r=0.8, one=2.0).speedup == 2.5
    assert verdict(u=1.0, r=0.8).speedup is None
    assert verdict(u=1.0, r=0.8).paces["u"].spread == pytest.approx(0.1)


def test_one_is_doubted_after_a_day_or_many_runs_and_the_ranks_are_not():
    one, ranks = verdict(u=1.0, one=0.5), verdict(u=1.0, one=2.0)
    for unix_s, num_runs, is_doubted in (
        (9.0, 0, False),
        (9.0 + DAY_S - 1, NUM_RUNS - 1, False),
        (9.0 + DAY_S, 0, True),
        (9.0, NUM_RUNS, True),
        (8.0, 0, True),  # the clock was set back
    ):
        assert Verdict(one.paces, 9.0, num_runs).is_doubted(unix_s) == is_doubted
        assert not Verdict(ranks.paces, 9.0, num_runs).is_doubted(unix_s)


def workload(**changes):
    sizes = {"batch_size": 1, "num_text_tokens": 256, "num_image_tokens": 4096, "num_heads": 24}
    return Workload(**{**sizes, **changes})


def test_calls_of_about_a_size_are_one_kind():
    base = size_class(workload())
    assert base == "1 x 2^12 tokens"
    assert size_class(workload(num_text_tokens=300)) == base
    assert size_class(workload(num_image_tokens=8192)) != base
    assert size_class(workload(num_reference_tokens=4096)) != base
    assert size_class(workload(batch_size=2)) != base
