"""A residual that is a recipe: what is written down, and what makes it a tensor."""

from __future__ import annotations

import gc

import pytest
import torch

from comfy_xdit_patch.host.step.residuals_there import ControlCall, DeferredResidual, encode_control
from comfy_xdit_patch.planning.plan import ParallelPlan

PLAN = ParallelPlan(ulysses=2)
SHAPE = (1, 6, 4)


class World:
    """One ControlNet call with two residuals, computed here when somebody asks."""

    def __init__(self):
        self.computed = 0
        self.gone = []
        self.numbers = [torch.rand(SHAPE), torch.rand(SHAPE)]
        self.call = ControlCall(
            3,
            plan=PLAN,
            layout={"input": [0, 0, 1], "output": [None]},
            compute=self.compute,
            gone=self.gone,
        )

    def compute(self):
        self.computed += 1
        a, b = self.numbers
        return {"input": (a, a, b), "output": (None,)}

    def residual(self, index):
        return DeferredResidual.make(
            ("residual", self.call, index),
            shape=SHAPE,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.fixture
def world():
    return World()


class Everything:
    """Ranks that keep what any call left there."""

    def __contains__(self, call):
        return True


def encode(control, *, kept=Everything(), plan=PLAN):  # noqa: B008
    placed = []

    def place(name, tensor):
        placed.append((name, tensor))
        return {"$slot": len(placed) - 1}

    return encode_control(control, place, kept=kept, plan=plan), placed


@torch.inference_mode()
def test_strength_and_sum_are_written_down_and_nothing_is_computed(world):
    first, second = world.residual(0), world.residual(1)
    first *= 0.5
    total = first + second * 2
    tree, placed = encode({"input": [total, None, total, first], "middle": []})
    assert tree["blocks"] == {"input": [0, None, 0, 1], "middle": []}
    assert tree["unique"] == [
        ["add", ["mul", ["residual", 3, 0], 0.5], ["mul", ["residual", 3, 1], 2]],
        ["mul", ["residual", 3, 0], 0.5],
    ]
    assert (world.computed, placed) == (0, [])


@torch.inference_mode()
def test_a_residual_of_a_controlnet_that_ran_here_is_carried_as_a_tensor(world):
    here = torch.rand(SHAPE)
    tree, placed = encode({"input": [world.residual(0) + here, here]})
    assert tree["unique"][0] == ["add", ["residual", 3, 0], ["tensor", {"$slot": 0}]]
    assert torch.equal(placed[0][1], here)


@torch.inference_mode()
def test_rows_that_a_sum_repeats_are_all_there():
    world = World()
    one_row = torch.rand(1, 6, 4)
    residual = DeferredResidual.make(
        ("residual", world.call, 0),
        shape=(2, 6, 4),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    total = residual + one_row
    assert total.shape == (2, 6, 4)
    _, placed = encode({"input": [total]})
    assert placed[0][1].shape == (2, 6, 4)


@pytest.mark.parametrize(
    ("kept", "plan"),
    [((), PLAN), (Everything(), ParallelPlan(batch=2))],
    ids=["workers", "plan"],
)
def test_what_the_workers_of_now_do_not_have_is_computed_here(world, kept, plan):
    residual = world.residual(1)
    residual *= 3
    tree, placed = encode({"input": [residual]}, kept=kept, plan=plan)
    assert tree["unique"] == [["tensor", {"$slot": 0}]]
    assert torch.equal(placed[0][1], world.numbers[1] * 3)


@torch.inference_mode()
def test_stock_arithmetic_on_a_residual_gives_stocks_numbers(world):
    image = torch.rand(1, 8, 4)
    expected = image.clone()
    expected[:, :6] += world.numbers[0] * 0.25
    residual = world.residual(0)
    residual *= 0.25
    image[:, : residual.shape[1]] += residual
    assert torch.equal(image, expected)
    assert world.computed == 1


@torch.inference_mode()
def test_what_is_changed_in_place_stays_changed(world):
    residual = world.residual(0)
    same = residual
    residual += torch.ones(SHAPE)
    residual[:, 0] = 7
    assert same is residual
    expected = world.numbers[0] + 1
    expected[:, 0] = 7
    assert torch.equal(residual.numbers(), expected)
    tree, placed = encode({"input": [residual]})
    assert tree["unique"] == [["tensor", {"$slot": 0}]]
    assert torch.equal(placed[0][1], expected)
    assert torch.equal(world.residual(0).numbers(), world.numbers[0]), "others are not changed"


@torch.inference_mode()
def test_another_dtype_is_written_down(world):
    residual = world.residual(0).to(torch.bfloat16)
    assert residual.dtype == torch.bfloat16
    tree, _ = encode({"input": [residual]})
    assert tree["unique"] == [["to", ["residual", 3, 0], "bfloat16"]]
    assert torch.equal(residual.numbers(), world.numbers[0].to(torch.bfloat16))


def test_the_workers_hear_when_nothing_refers_to_a_call(world):
    residual = world.residual(0) * 2
    world.call = None
    gc.collect()
    assert world.gone == []
    del residual
    gc.collect()
    assert world.gone == [3]
