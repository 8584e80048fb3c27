"""Recipes of residuals are alike from step to step once the calls in them are numbered anew."""

from __future__ import annotations

import torch

from comfy_xdit_patch.worker.shard.residuals import Residuals, ResidualSet


def step(first: int, second: int, value: float):
    """What a rank keeps of two calls of ControlNets, and the recipe of their sum."""
    residuals = Residuals()
    for call in (first, second):
        tensors = [torch.full((1, 2, 3), value * call + n) for n in range(2)]
        residuals.keep(call, ResidualSet((2, 2), tensors))
    recipe = ["add", ["mul", ["residual", second, 1], 0.5], ["residual", first, 0]]
    return residuals, {"unique": [recipe], "blocks": {"input": [0, None, 0]}}


def test_numbered_recipes_are_alike_and_give_what_they_gave():
    found = []
    for first, second, value in ((5, 9, 1.0), (7, 11, 2.0)):
        residuals, control = step(first, second, value)
        numbered, kept = residuals.numbered(control)
        found.append(numbered)
        assert [image for image, _ in kept] == [(2, 2)] * 2
        before, after = residuals.whole(control), Residuals.of(kept).whole(numbered)
        assert before.keys() == after.keys()
        assert torch.equal(before["input"][0], after["input"][0])
        assert after["input"][0] is after["input"][2]
    assert found[0] == found[1]
