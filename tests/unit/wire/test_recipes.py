"""Recipes are followed from their leaves on, on either side of the wire."""

from __future__ import annotations

import json

import pytest
import torch

from comfy_xdit_patch.wire.recipes import arithmetic, follow, written

RECIPE = ("to", ("add", ("mul", ("residual", "call", 0), 0.5), ("tensor", 2.0)), "float16")


def test_what_is_sent_gives_what_is_computed_here():
    kept = torch.rand(2, 3)
    here = follow(
        RECIPE,
        {"residual": lambda _, __: kept, "tensor": lambda number: torch.full((2, 3), number)},
        arithmetic,
    )
    names = {"residual": lambda _, index: ["residual", 7, index], "tensor": lambda t: ["tensor", t]}
    sent = json.loads(json.dumps(follow(RECIPE, names, written)))
    assert sent[1][1] == ["mul", ["residual", 7, 0], 0.5]
    there = follow(
        sent,
        {"residual": lambda _, __: kept, "tensor": lambda number: torch.full((2, 3), number)},
        arithmetic,
    )
    assert torch.equal(here, (kept * 0.5 + 2).half())
    assert torch.equal(here, there)


def test_a_step_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="'sub' is not a step"):
        follow(("sub", ("kept", 1), 2), {"kept": lambda _: torch.ones(1)}, arithmetic)
