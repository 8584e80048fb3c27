"""Plans by their degrees: names, the grid of ranks, what a user may ask for."""

from __future__ import annotations

import re

import pytest

from comfy_xdit_patch.planning.cost.candidate import (
    NAMED,
    SINGLE,
    STRATEGY_LEGAL,
    WEIGHTS,
    Candidate,
    candidates,
    is_built,
    parse_asked,
)
from comfy_xdit_patch.planning.grid import AXES
from comfy_xdit_patch.planning.plan import ParallelPlan


def test_a_name_says_where_the_weights_lie_besides():
    assert Candidate(batch=2, ulysses=2).name == "batch=2,ulysses=2"
    assert SINGLE.name == "single"
    assert Candidate(ulysses=4, weights="sharded").name == "ulysses=4,fsdp=4"
    assert Candidate(ring=2, weights="modulation").name == "ring=2,modulation=2"
    assert Candidate(batch=2, ring=2, weights="offload").name == "batch=2,ring=2,offload=4"


def test_all_plans_of_two_gpus():
    names = {plan.name for plan in candidates(2)}
    axes = ["batch", "pipefusion", "ring", "ulysses", "tensor"]
    assert names == {
        "single",
        *(f"{axis}=2" for axis in axes),
        *(
            f"{axis}=2,{weights}=2"
            for axis in ("batch", "ring", "ulysses")
            for weights in ("modulation", "fsdp", "offload")
        ),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
def test_every_plan_is_listed_once_and_uses_no_more_gpus_than_there_are(world_size):
    plans = list(candidates(world_size))
    assert len(set(plans)) == len(plans)
    assert {plan.world_size for plan in plans} == set(range(1, world_size + 1))
    assert Candidate(ulysses=world_size) in plans


def test_weights_that_are_split_anyway_are_not_sharded_besides():
    for plan in candidates(8):
        assert plan.weights == "full" or plan.pipefusion == plan.tensor == 1


def test_a_name_is_read_back_as_the_same_plan():
    assert [plan for plan in candidates(8) if parse_asked(plan.name).plan != plan] == []


def test_what_talks_most_sits_closest():
    plan = Candidate(batch=2, ring=2, ulysses=2)
    assert plan.groups("ulysses") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert plan.groups("ring") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert plan.groups("batch") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert plan.groups("tensor") == [(rank,) for rank in range(8)]


def test_the_grid_is_that_of_parallel_plans():
    plan, parallel = Candidate(batch=2, ulysses=3), ParallelPlan(batch=2, ulysses=3)
    for rank, place in enumerate(plan.places()):
        index = dict(zip(AXES, place, strict=True))
        assert index["batch"] == parallel.batch_index(rank)
        assert index["ulysses"] == parallel.sequence_index(rank)


def test_only_pipefusion_is_not_exact():
    assert not Candidate(pipefusion=2, ulysses=2).is_exact
    exact = [plan for plan in candidates(8) if plan.is_exact]
    assert all(plan.pipefusion == 1 for plan in exact)
    assert len(exact) > 50


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cfg=2,ulysses=2", "batch=2,ulysses=2"),
        (" Ulysses=2, RING=2 ", "ulysses=2,ring=2"),
        ("fsdp=4", "ulysses=4,fsdp=4"),
        ("ring=4,fsdp=4", "ring=4,fsdp=4"),
        ("modulation=4", "ulysses=4,modulation=4"),
        ("single", "single"),
        ("fsdp=1", "fsdp=1"),
    ],
)
def test_a_plan_is_read_as_a_user_writes_it(text, name):
    assert parse_asked(text).plan is not None
    assert parse_asked(text).plan.name == name


@pytest.mark.parametrize(
    "text",
    [
        *("", "ulises", "ulysses=", "ulysses=0", "ulysses=2,ulysses=2", "cfg=2,batch=2"),
        *("ulysses=2;ring=2", "ulysses=2,fsdp=4", "fsdp=2,offload=2", "tensor=2,fsdp=2"),
        *("pipefusion=2,offload=2", "steps=2", "off", "tensor=2,modulation=2"),
        *("ulysses=2,modulation=4", "fsdp=2,modulation=2", "offload=2,modulation=2"),
    ],
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        parse_asked(text)


def test_the_text_of_legal_strategies_names_them_all():
    assert all(name in STRATEGY_LEGAL for name in (*NAMED, *AXES, *WEIGHTS.values()))


@pytest.mark.parametrize(
    ("strategy", "allowed", "others"),
    [
        ("auto", ["single", "ulysses=2", "batch=2,fsdp=2"], ["pipefusion=2", "ring=2,tensor=2"]),
        ("batch", ["batch=4"], ["single", "batch=2,ulysses=2"]),
        ("cfg", ["batch=2"], ["ulysses=2"]),
        ("ulysses", ["ulysses=4"], ["single", "batch=2,ulysses=2", "ulysses=2,ring=2"]),
        ("ring", ["ring=4", "ring=2,fsdp=2"], ["ulysses=2,ring=2", "batch=2,ring=2"]),
        ("usp", ["ulysses=2,ring=2"], ["batch=2,ulysses=2,ring=2", "ulysses=4", "ring=4"]),
        ("tensor", ["tensor=2"], ["batch=2,tensor=2", "ulysses=2,tensor=2"]),
        ("pipefusion", ["pipefusion=4"], ["pipefusion=2,ulysses=2", "ulysses=2"]),
        ("fsdp", ["ulysses=2,fsdp=2", "batch=2,ring=2,fsdp=4"], ["ulysses=2", "ring=2,offload=2"]),
    ],
)
def test_a_strategy_by_name_allows_its_axes(strategy, allowed, others):
    asked = parse_asked(strategy)
    assert [name for name in allowed if not asked.allows(parse_asked(name).plan)] == []
    assert [name for name in others if asked.allows(parse_asked(name).plan)] == []


def test_what_the_engine_cannot_follow_is_a_pipeline_with_a_ring_or_with_cut_blocks():
    refused = {plan for plan in candidates(8) if not is_built(plan)}
    assert refused
    assert refused == {
        plan for plan in candidates(8) if plan.pipefusion > 1 and (plan.ring > 1 or plan.tensor > 1)
    }


def test_a_plan_by_its_degrees_allows_itself_only():
    asked = parse_asked("ulysses=2,ring=2")
    assert [plan.name for plan in candidates(8) if asked.allows(plan)] == ["ulysses=2,ring=2"]
