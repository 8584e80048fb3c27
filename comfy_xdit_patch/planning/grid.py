"""The grid of ranks: how many share each axis of a plan, and which.

Runs in: host, worker and the command line's process. Standard library only.

One equation: ``batch * pipefusion * ring * ulysses * tensor == world_size``. Tensor varies fastest,
then ulysses, ring, pipefusion, batch: what talks most sits closest. It is the order
"tp-sp-pp-cfg-dp" of xfuser's ``RankGenerator``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from comfy_xdit_patch.errors import PlanError

AXES = ("batch", "pipefusion", "ring", "ulysses", "tensor")
"""Slowest first; how messages name a plan."""
AS_WRITTEN = ("batch", "pipefusion", "ulysses", "ring", "tensor")
"""In the order in which a plan's name has them."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many ranks share each of ``AXES``."""

    batch: int = 1
    pipefusion: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise PlanError(f"{self.product} are not degrees.")

    @property
    def grid(self) -> tuple[int, ...]:
        """The degrees in the order of ``AXES``."""
        return self.batch, self.pipefusion, self.ring, self.ulysses, self.tensor

    @property
    def world_size(self) -> int:
        return prod(self.grid)

    @property
    def sequence(self) -> int:
        """How many ranks share the tokens of one row."""
        return self.ring * self.ulysses

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes on which there are several ranks, ``AS_WRITTEN``."""
        return tuple(axis for axis in AS_WRITTEN if getattr(self, axis) > 1)

    @property
    def product(self) -> str:
        """All degrees, for an error about them."""
        return " x ".join(f"{axis} {n}" for axis, n in zip(AXES, self.grid, strict=True))

    @property
    def parts(self) -> list[str]:
        """What the name is made of: ``batch=2`` and ``ulysses=2``."""
        return [f"{axis}={getattr(self, axis)}" for axis in self.axes]

    @property
    def name(self) -> str:
        """As users write and read it, e.g. ``batch=2,ulysses=2``; ``single`` for one rank."""
        return ",".join(self.parts) or "single"

    @property
    def is_exact(self) -> bool:
        """PipeFusion uses keys and values of the call before: its image is an approximation."""
        return self.pipefusion == 1

    @property
    def exchanges_heads(self) -> bool:
        """Whether ranks exchange tokens for heads of whole calls, which can be in 8 bits."""
        return self.ulysses > 1 and self.pipefusion == 1

    def places(self) -> Iterator[tuple[int, ...]]:
        """Each rank's index in every one of ``AXES``."""
        return product(*map(range, self.grid))

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """Ranks that differ in these axes only, one tuple for each collective that runs at once."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(self.places()):
            others = tuple(i for axis, i in zip(AXES, place, strict=True) if axis not in axes)
            found.setdefault(others, []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    @property
    def num_communicators(self) -> int:
        """How many communicators a rank has after a call, without that of weight shards.

        One of all ranks, in which they first meet; one for each axis on which there are others,
        unless that is all ranks; and what passes from stage to stage has one for each neighbour.
        """
        axes = [self.sequence, self.tensor]
        if self.ring > 1 and self.ulysses > 1:
            axes += [self.ring, self.ulysses]
        apart = sum(1 < degree < self.world_size for degree in axes)
        return 1 + apart + min(self.pipefusion - 1, 2)
