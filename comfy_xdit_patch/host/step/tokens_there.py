"""Tokens between two blocks that lie on the workers, as a tensor of the host's.

Runs in: host process.

A node that works around the blocks mostly passes tokens on from one block to the next. Then nothing
is carried: the object says where they are. What ComfyUI does between the blocks (join text and
image, take the image again) is written down too. Whoever looks at the numbers gets them, gathered
from all ranks; from then on they are here, and are sent when a block wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from comfy_xdit_patch.host.step.lazy_tensor import LazyTensor
from comfy_xdit_patch.planning.sequence_shares import SEQUENCE_DIM
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.recipes import Recipe, follow, written

aten = torch.ops.aten

Counts = tuple[int, int, int]
"""How many text, image and reference tokens all ranks share."""


class Kept:
    """One tensor on the ranks. ``forget`` is called with its number when nothing refers to it."""

    def __init__(self, number: int, forget: Callable[[int], None]) -> None:
        self.number = number
        self._forget = forget

    def __del__(self) -> None:
        self._forget(self.number)


Fetch = Callable[["RemoteTokens"], torch.Tensor]


class RemoteTokens(LazyTensor):
    """Tokens of one stream: see the module.

    They are ``here`` as an ordinary tensor, or on the ranks as ``recipe`` says, or they are the
    image's part of ``parent`` and wherever that is: a slice shares its numbers with the whole.
    ``counts`` and ``weights`` say how the ranks share them.
    """

    stream: str
    counts: Counts
    own_weights: tuple[int, ...]
    parent: RemoteTokens | None
    fetch: Fetch | None
    own_recipe: Recipe

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
        made = RemoteTokens.empty(shape, dtype=like.dtype, device=like.device)
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
        """Be an ordinary tensor, and return it; a part is one of its parent's."""
        if self.parent is not None:
            return self.parent.numbers()[:, self.parent.counts[0] :]
        return super().numbers()

    def compute(self) -> torch.Tensor:
        """Gather them from the ranks."""
        assert self.fetch is not None
        return self.fetch(self)

    def move(
        self, recipe: Recipe, counts: Counts, fetch: Fetch, weights: tuple[int, ...] = ()
    ) -> None:
        """Be other tokens on the ranks: a block changed these in place."""
        self.own_recipe, self.counts, self.fetch, self.here = recipe, counts, fetch, None
        self.own_weights = weights

    @classmethod
    def record(
        cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> RemoteTokens | None:
        """Write down what is done to tokens, or return None: the numbers are needed."""
        if (
            func is aten.cat.default
            and len(args) == 2
            and args[1] in (SEQUENCE_DIM, SEQUENCE_DIM - 3)
        ):
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
            if (
                is_there
                and tokens.stream == "joint"
                and dim == SEQUENCE_DIM
                and args[4:] in ((), (1,))
            ):
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
    return follow(recipe, {"kept": lambda kept: ["kept", kept.number]}, written)
