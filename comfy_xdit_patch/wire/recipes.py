"""Recipes: what is to be done to tensors that lie on the ranks.

Runs in: host and worker.

A recipe is a kind and its parts. Its parts are recipes and plain values, down to the leaves, which
say where a tensor is. The host writes a recipe down in tuples; on the way to the ranks it is a list
of lists, with numbers in the place of the host's objects.

    leaves   (residual, call, index)  (tensor, t)  (kept, number)
    steps    (mul, a, number)  (add, a, b)  (to, a, dtype)           of residuals
             (join, text, image)  (image, joint)                     of tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from comfy_xdit_patch.wire.tensors import dtype_of

Recipe = Sequence[Any]
Leaves = Mapping[str, Callable[..., Any]]
"""What each kind of leaf is, from its parts."""
Step = Callable[..., Any]
"""Takes the kind of a step and its parts, which were followed."""


def arithmetic(kind: str, first: torch.Tensor, second: Any) -> torch.Tensor:
    """Do one step of a residual's recipe.

    Raises:
        ValueError: there is no such step.
    """
    if kind == "mul":
        return torch.mul(first, second)
    if kind == "add":
        return torch.add(first, second)
    if kind == "to":
        return first.to(dtype_of(second))
    raise ValueError(f"{kind!r} is not a step of a residual's recipe.")


def written(*recipe: Any) -> list[Any]:
    """Do nothing: a step of a recipe as it is sent."""
    return list(recipe)


def follow(recipe: Recipe, leaves: Leaves, step: Step) -> Any:
    """Follow a recipe from its leaves on."""
    kind, *parts = recipe
    if kind in leaves:
        return leaves[kind](*parts)
    followed = (follow(p, leaves, step) if isinstance(p, (tuple, list)) else p for p in parts)
    return step(kind, *followed)
