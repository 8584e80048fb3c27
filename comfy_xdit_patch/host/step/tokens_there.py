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

from comfy_xdit_patch.wire.messages.requests import Tree

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
Fetch = Callable[["RemoteTokens"], torch.Tensor]


class RemoteTokens(torch.Tensor):
    """Tokens of one stream: see the module.

    They are ``here`` as an ordinary tensor, or on the ranks as ``recipe`` says, or they are the
    image's part of ``parent`` and wherever that is: a slice shares its numbers with the whole.
    ``counts`` and ``weights`` say how the ranks share them.
    """

    stream: str
    counts: Counts
    own_weights: tuple[int, ...]
    here: torch.Tensor | None
    parent: RemoteTokens | None
    fetch: Fetch | None
    own_recipe: Recipe

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def make(
        stream: str,
        *,
        shape: Sequence[int],
        like: Any,
        recipe: Recipe = (),
        counts: Counts = (0, 0, 0),
        weights: tuple[int, ...] = (),
        here: torch.Tensor | None = None,
        parent: RemoteTokens | None = None,
        fetch: Fetch | None = None,
    ) -> RemoteTokens:
        """Return tokens of the dtype and on the device of ``like``."""
        made: RemoteTokens = torch.Tensor._make_wrapper_subclass(
            RemoteTokens, tuple(shape), dtype=like.dtype, device=like.device
        )
        made.stream, made.own_recipe, made.counts = stream, recipe, counts
        made.here, made.parent, made.fetch = here, parent, fetch
        made.own_weights = weights
        return made

    @property
    def recipe(self) -> Recipe | None:
        """How the ranks find these tokens, or None if they are here."""
        if self.parent is None:
            return self.own_recipe if self.here is None else None
        return None if self.parent.recipe is None else ("image", self.parent.recipe)

    @property
    def weights(self) -> tuple[int, ...]:
        """Weights of the ranks by which these tokens are shared."""
        return self.own_weights if self.parent is None else self.parent.weights

    def numbers(self) -> torch.Tensor:
        """Be an ordinary tensor, and return it."""
        if self.parent is not None:
            return self.parent.numbers()[:, self.parent.counts[0] :]
        if self.here is None:
            assert self.fetch is not None
            self.here = self.fetch(self)
        return self.here

    def move(
        self, recipe: Recipe, counts: Counts, fetch: Fetch, weights: tuple[int, ...] = ()
    ) -> None:
        """Be other tokens on the ranks: a block changed these in place."""
        self.own_recipe, self.counts, self.fetch, self.here = recipe, counts, fetch, None
        self.own_weights = weights

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
                numbers = value.numbers()
                owners[id(numbers)] = value
                return numbers
            return value

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda value: owners.get(id(value), value), out)


def _recorded(func: Any, args: Sequence[Any]) -> RemoteTokens | None:
    """Write down what is done to tokens, or return None: the numbers are needed."""
    if func is aten.cat.default and len(args) == 2 and args[1] in (SEQUENCE_DIM, SEQUENCE_DIM - 3):
        parts = args[0]
        if len(parts) == 2 and all(isinstance(p, RemoteTokens) and p.recipe for p in parts):
            text, image = parts
            is_pair = (text.stream, image.stream) == ("text", "image")
            is_pair = is_pair and text.weights == image.weights
            if is_pair and text.counts == image.counts:
                return RemoteTokens.make(
                    "joint",
                    shape=(image.shape[0], text.shape[1] + image.shape[1], image.shape[2]),
                    like=image,
                    recipe=("join", text.recipe, image.recipe),
                    counts=image.counts,
                    fetch=image.fetch,
                    weights=image.weights,
                )
    if func is aten.slice.Tensor:
        tokens, dim, start, end = (*args, 0, None, None)[:4]
        is_there = isinstance(tokens, RemoteTokens) and tokens.recipe is not None
        if is_there and tokens.stream == "joint" and dim == SEQUENCE_DIM and args[4:] in ((), (1,)):
            length, num_text = tokens.shape[1], tokens.counts[0]
            if start == num_text and (end is None or end >= length):
                return RemoteTokens.make(
                    "image",
                    shape=(tokens.shape[0], length - num_text, tokens.shape[2]),
                    like=tokens,
                    counts=tokens.counts,
                    parent=tokens,
                )
    return None


def encode(recipe: Recipe) -> Tree:
    """Turn a recipe into a tree for the workers."""
    kind, *parts = recipe
    if kind == "kept":
        return [kind, parts[0].number]
    return [kind, *(encode(part) for part in parts)]


def encode_modulation(value: Any) -> Any:
    """Turn what modulates a block into tensors, lists and dictionaries."""
    if isinstance(value, (tuple, list)):
        return [encode_modulation(item) for item in value]
    if all(hasattr(value, name) for name in ("shift", "scale", "gate")):
        return {"$modulation": [value.shift, value.scale, value.gate]}
    return value
