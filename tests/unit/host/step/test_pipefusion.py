"""What the ranks are told of a call, and runs that PipeFusion does not serve."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.reading.node_patches import CarriedPatches
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.pipefusion import Pipelines
from comfy_xdit_patch.planning.plan import ParallelPlan

PLAN = ParallelPlan(pipefusion=2)
CONTEXT = torch.zeros(1, 77, 8)
SIGMAS = torch.linspace(1, 0, 11)


class Crew:
    """Counts requests; its own turn."""

    number = 1

    def __init__(self):
        self.requests = []
        self.known = {}

    def of(self, make):
        return self.known.setdefault(make, make(self))

    @contextlib.contextmanager
    def turn(self, poll):
        yield self

    def ask(self, message):
        self.requests.append(message)


class Flux:
    """Has as many blocks as FLUX.1 in tests."""

    double_blocks = single_blocks = (None, None)
    patch_size, num_heads = 2, 4


Flux.__module__, Flux.__name__ = "comfy.ldm.flux.model", "Flux"


class Radiance(Flux):
    """Works on pixels."""


Radiance.__module__, Radiance.__name__ = "comfy.ldm.chroma_radiance.model", "ChromaRadiance"


@pytest.fixture
def pipelines():
    made = Pipelines()
    made.crew = Crew()
    return made


def call(pipelines, run, sigma=0.9, tree=None, **changes):
    options = {
        "sample_sigmas": SIGMAS,
        "sigmas": torch.full((1,), sigma),
        "cond_or_uncond": changes.pop("cond", [0]),
    }
    x = torch.zeros(changes.pop("shape", (1, 16, 16, 16)))
    given = Call(
        Flux(),
        None,
        {
            "x": x,
            "timestep": x[:1],
            "context": torch.zeros(1, 77, 8),
            "transformer_options": options,
        },
        run,
        CarriedPatches(tree=changes.pop("patches", None)),
        poll=lambda: None,
    )
    of_call = {"plan": PLAN, "model": (1, "key")} | changes
    return pipelines.of_call(pipelines.crew, given, **of_call), tree or {"context": 1}


def exact(pipelines, run, *calls):
    found = []
    for changes in calls:
        made, tree = call(pipelines, run, **changes)
        found.append(made.tree(tree)["is_warm_up"])
    return found


def test_the_ranks_are_told_stream_exactness_and_patches(pipelines):
    run = Run()
    made, tree = call(pipelines, run)
    assert made.tree(tree) == {"stream": 1, "is_warm_up": True, "num_patches": 4}
    made, tree = call(pipelines, run, sigma=0.8)
    assert made.tree(tree) == {"stream": 1, "is_warm_up": False, "num_patches": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (1, 16, 16, 18)},
        {"tree": {"context": 2}},
        {"tree": {"context": 1, "control": {}}},
        {"tree": {"context": 1, "attention_mask": 5}},
        {"model": (1, "other weights")},
        {"model": (2, "key")},
        {"patches": {"skip": []}},
        {"plan": ParallelPlan(pipefusion=2, weights=(1, 2))},
        {"cond": [1]},
    ],
    ids=str,
)
def test_a_call_is_exact_if_anything_but_the_latent_and_sigma_changed(pipelines, change):
    assert exact(pipelines, Run(), {}, {}, change) == [True, False, True]


@pytest.mark.parametrize("name", ["guidance", "x", "timestep"])
def test_what_moves_in_every_step_makes_no_call_exact(pipelines, name):
    changed = {"tree": {"context": 1, name: 2}}
    assert exact(pipelines, Run(), {}, changed) == [True, False]


def test_a_new_run_new_workers_and_a_step_that_fell_back_make_a_call_exact(pipelines):
    run = Run()
    assert exact(pipelines, run, {}, {}) == [True, False]
    assert exact(pipelines, Run(), {}) == [True]
    run.counts.fall_backs["something"] += 1
    assert exact(pipelines, run, {}, {}) == [True, False]
    pipelines.crew = Crew()
    assert exact(pipelines, run, {}, {}) == [True, False]


def test_the_end_of_a_run_frees_its_streams_once(pipelines):
    run = Run()
    exact(pipelines, run, {}, {"cond": [1]})
    for _ in range(2):
        pipelines.end(pipelines.crew, run)
    (message,) = pipelines.crew.requests
    assert message.streams == [1, 2]


def test_nothing_is_asked_of_new_ranks_or_for_a_run_without_streams(pipelines):
    pipelines.end(pipelines.crew, Run())
    run = Run()
    exact(pipelines, run, {})
    others = Crew()
    pipelines.end(others, run)
    assert pipelines.crew.requests == others.requests == []


def refusal(pipelines, *, flux=None, plan=PLAN, changes=(), carried=None, is_run=True, **options):
    options = {"sample_sigmas": SIGMAS, **options}
    given = Call(
        flux or Flux(),
        None,
        {"transformer_options": options},
        Run(object() if is_run else None),
        carried or CarriedPatches(),
        list(changes),
        poll=lambda: None,
    )
    return pipelines.refusal(given, plan)


def test_a_plain_run_of_five_steps_is_served(pipelines):
    assert refusal(pipelines) is None
    assert refusal(pipelines, sample_sigmas=torch.zeros(6)) is None


TREE = {"patches": {}, "skip": [], "attention": None}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"sample_sigmas": torch.zeros(5)}, "needs 5 steps or more"),
        ({"sample_sigmas": None}, "has to know the sigmas"),
        ({"is_run": False}, "where a run begins and ends"),
        ({"context_window": object()}, "cut into windows"),
        ({"flux": Radiance()}, "work on pixels"),
        ({"plan": ParallelPlan(pipefusion=5)}, "pipefusion=5 is more than the 4"),
        ({"changes": [Refusal("a node replaces blocks")]}, "and a node replaces blocks"),
        ({"carried": CarriedPatches(gathered="a node set a x patch")}, "a node set a x patch"),
        ({"carried": CarriedPatches(keeps_references=True)}, "keeps the keys of references"),
        ({"carried": CarriedPatches(tree=TREE | {"skip": [[]]})}, "leaves out blocks"),
        (
            {"carried": CarriedPatches(tree=TREE | {"attention": {"wants_order": True}})},
            "chose the attention function",
        ),
    ],
)
def test_a_run_is_refused_with_its_reason(pipelines, what, reason):
    found = refusal(pipelines, **what)
    assert isinstance(found, Refusal)
    assert reason in found.reason
    assert found.scope is Scope.RUN


def test_an_attention_function_that_knows_no_places_is_served(pipelines):
    tree = TREE | {"attention": {"wants_order": False}}
    assert refusal(pipelines, carried=CarriedPatches(tree=tree)) is None


def test_numbers_of_streams_are_never_used_twice(pipelines):
    runs = [Run(), Run()]
    for run, cond in itertools.product(runs, ([0], [1])):
        exact(pipelines, run, {"cond": cond})
    for run in runs:
        pipelines.end(pipelines.crew, run)
    numbers = [number for message in pipelines.crew.requests for number in message.streams]
    assert len(set(numbers)) == len(numbers) == 4
