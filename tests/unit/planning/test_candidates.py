"""Which plans are worth a trial."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.candidates import candidates
from comfy_xdit_patch.planning.plan import Workload
from comfy_xdit_patch.planning.planner import plan_call
from comfy_xdit_patch.planning.strategy import AUTO

IMAGE = Workload(1, 256, 4096, num_heads=24)
CFG = replace(IMAGE, batch_size=2)
BOUND = replace(CFG, is_batch_divisible=False)
NONE = Refusal("a node chose the attention function")


def names(workload, world_size, *, is_whole=True, fits=lambda plan: True, no_ring=None):
    """Names of the plans, as a call would have them."""

    def can_have(strategy):
        plan = plan_call(workload, world_size=world_size, strategy=strategy, no_ring=no_ring)
        return None if isinstance(plan, Refusal) or not fits(plan) else plan

    usual = plan_call(workload, world_size=world_size)
    found = candidates(usual, workload, is_whole=is_whole, can_have=can_have)
    assert next(iter(found)) == AUTO
    assert all(plan.is_exact and plan.world_size == world_size for plan in found.values())
    return [plan.name for plan in found.values()]


@pytest.mark.parametrize(
    ("workload", "world_size", "expected"),
    [
        (IMAGE, 2, ["ulysses=2", "ring=2"]),
        (IMAGE, 3, ["ulysses=3", "ring=3"]),
        (IMAGE, 4, ["ulysses=4", "ulysses=2,ring=2"]),
        (IMAGE, 5, ["ulysses=5", "ring=5"]),
        (IMAGE, 8, ["ulysses=8", "ulysses=4,ring=2"]),
        (IMAGE, 10, ["ulysses=10", "ulysses=2,ring=5"]),
        (IMAGE, 16, ["ulysses=16", "ulysses=8,ring=2"]),
        (CFG, 2, ["batch=2"]),
        (CFG, 4, ["batch=2,ulysses=2", "batch=2,ring=2"]),
        (CFG, 8, ["batch=2,ulysses=4", "batch=2,ulysses=2,ring=2"]),
        (BOUND, 4, ["ulysses=4", "ulysses=2,ring=2"]),
    ],
)
def test_the_smallest_ring_beside_which_heads_divide_is_tried(workload, world_size, expected):
    assert names(workload, world_size) == expected


@pytest.mark.parametrize(
    ("workload", "world_size", "expected"),
    [
        (IMAGE, 2, ["ulysses=2", "tensor=2"]),
        (IMAGE, 3, ["ulysses=3", "tensor=3"]),
        (IMAGE, 4, ["ulysses=4", "ulysses=2,tensor=2"]),
        (CFG, 2, ["batch=2", "tensor=2"]),
        (CFG, 4, ["batch=2,ulysses=2", "batch=2,tensor=2"]),
        (CFG, 8, ["batch=2,ulysses=4", "batch=2,ulysses=2,tensor=2"]),
    ],
)
def test_weights_that_are_not_whole_are_cut_in_the_fewest_parts(workload, world_size, expected):
    assert names(workload, world_size, is_whole=False) == expected


@pytest.mark.parametrize(
    ("workload", "expected"), [(IMAGE, ["ulysses=4"]), (CFG, ["batch=2,ulysses=2"])]
)
def test_more_parts_are_cut_where_fewer_do_not_fit(workload, expected):
    found = names(workload, 4, is_whole=False, fits=lambda plan: plan.tensor == 4)
    assert found == [*expected, "tensor=4"]


def test_what_a_call_cannot_have_is_left_out():
    assert names(IMAGE, 4, no_ring=NONE) == ["ulysses=4"]
    assert names(IMAGE, 4, is_whole=False, fits=lambda plan: False) == ["ulysses=4"]
