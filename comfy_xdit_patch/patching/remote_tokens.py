"""Tokens between two blocks that lie on the workers, as a tensor of the host's.

Runs in: host process.

A node that works around the blocks mostly passes tokens on from one block to the next. Then nothing
is carried: the object says where they are. What ComfyUI does between the blocks (join text and
image, take the image again) is written down too. Whoever looks at the numbers gets them, gathered
from all ranks; from then on they are here, and are sent when a block wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from comfy_xdit_patch.transport.messages import Tree

aten = torch.ops.aten
SEQUENCE_DIM = 1

Counts = tuple[int, int, int]
"""How many text, image and reference tokens all ranks share."""


class Kept:
    """One tensor on the ranks. ``forget`` is called with its number when nothing refers to it."""

    def __init__(self, number: int, forget: Callable[[int], None]) -> None:
        self.number = number
        self._forget = forget

    def __del__(self) -> None:
        self._forget(self.number)


Recipe = tuple[Any, ...]
"""("kept", Kept), ("join", text, image) or ("image", joint)."""


class RemoteTokens(torch.Tensor):
    """Tokens of one stream: see the module."""

    recipe: Recipe
    stream: str
    counts: Counts
    here: torch.Tensor | None
    fetch: Callable[[RemoteTokens], torch.Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def make(
        recipe: Recipe,
        stream: str,
        counts: Counts,
        *,
        shape: Sequence[int],
        like: Any,
        fetch: Callable[[RemoteTokens], torch.Tensor],
    ) -> RemoteTokens:
        """Return the tokens of a recipe, of the dtype and on the device of ``like``."""
        made: RemoteTokens = torch.Tensor._make_wrapper_subclass(
            RemoteTokens, tuple(shape), dtype=like.dtype, device=like.device
        )
        made.recipe, made.stream, made.counts = recipe, stream, counts
        made.here, made.fetch = None, fetch
        return made

    def numbers(self) -> torch.Tensor:
        """Become an ordinary tensor, and return it."""
        if self.here is None:
            self.here = self.fetch(self)
            self.recipe = ()
        return self.here

    def move(self, recipe: Recipe, counts: Counts) -> None:
        """Be other tokens on the ranks: a block changed these in place."""
        self.recipe, self.counts, self.here = recipe, counts, None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        recorded = _recorded(func, args)
        if recorded is not None:
            return recorded
        owners: dict[int, RemoteTokens] = {}

        def unwrap(value: Any) -> Any:
            if isinstance(value, RemoteTokens):
                owners[id(value.numbers())] = value
                return value.numbers()
            return value

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda value: owners.get(id(value), value), out)


def _recorded(func: Any, args: Sequence[Any]) -> RemoteTokens | None:
    """Write down what is done to tokens, or return None: the numbers are needed."""
    if func is aten.cat.default and len(args) == 2 and args[1] in (SEQUENCE_DIM, SEQUENCE_DIM - 3):
        parts = args[0]
        if len(parts) == 2 and all(isinstance(p, RemoteTokens) and p.here is None for p in parts):
            text, image = parts
            is_pair = (text.stream, image.stream) == ("text", "image")
            if is_pair and text.counts == image.counts:
                length = text.shape[1] + image.shape[1]
                return _like(image, ("join", text.recipe, image.recipe), "joint", length)
    if func is aten.slice.Tensor:
        tokens, dim, start, end, *step = (*args, 0, None)[:4] if len(args) < 4 else args
        is_there = isinstance(tokens, RemoteTokens) and tokens.here is None
        if is_there and tokens.stream == "joint" and dim == SEQUENCE_DIM and step in ([], [1]):
            length = tokens.shape[1]
            num_text = tokens.counts[0]
            if start == num_text and (end is None or end >= length):
                return _like(tokens, ("image", tokens.recipe), "image", length - num_text)
    return None


def _like(tokens: RemoteTokens, recipe: Recipe, stream: str, length: int) -> RemoteTokens:
    shape = (tokens.shape[0], length, *tokens.shape[2:])
    return RemoteTokens.make(
        recipe, stream, tokens.counts, shape=shape, like=tokens, fetch=tokens.fetch
    )


def encode(recipe: Recipe) -> Tree:
    """Turn a recipe into a tree for the workers."""
    kind, *parts = recipe
    if kind == "kept":
        return [kind, parts[0].number]
    return [kind, *(encode(part) for part in parts)]
