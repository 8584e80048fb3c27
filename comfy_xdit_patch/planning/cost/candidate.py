"""One way to share the work, and all ways there are.

Runs in: the command line's process.

One equation: ``batch * pipefusion * ring * ulysses * tensor == world_size``; ``grid.py`` says
which ranks share an axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from comfy_xdit_patch.planning.grid import AXES, ranks_along
from comfy_xdit_patch.planning.residency import Mode
from comfy_xdit_patch.planning.strategy import AXES as AS_WRITTEN

WEIGHTS: dict[Mode, str] = {"modulation": "modulation", "sharded": "fsdp", "offload": "offload"}
"""Where weights lie that are not whole on every card, and how users write it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Degrees of every axis, and where the weights lie."""

    batch: int = 1
    pipefusion: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    weights: Mode = "full"

    @property
    def degrees(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        return prod(self.degrees.values())

    @property
    def sequence(self) -> int:
        """How many shards a row's tokens are cut into."""
        return self.ring * self.ulysses

    @property
    def is_exact(self) -> bool:
        """PipeFusion uses keys and values of the step before: its image is an approximation."""
        return self.pipefusion == 1

    @property
    def name(self) -> str:
        """As users write and read it, e.g. ``batch=2,ulysses=2``; ``single`` for one GPU."""
        parts = [f"{axis}={self.degrees[axis]}" for axis in AS_WRITTEN if self.degrees[axis] > 1]
        if self.weights in WEIGHTS:
            parts.append(f"{WEIGHTS[self.weights]}={self.world_size}")
        return ",".join(parts) or "single"

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Ranks that differ in one axis only, one tuple for each collective that runs at once."""
        return ranks_along(tuple(self.degrees.values()), axis)

    def places(self) -> Iterator[tuple[int, ...]]:
        """Each rank's index in every one of ``AXES``."""
        return product(*(range(self.degrees[axis]) for axis in AXES))


SINGLE = Candidate()


def candidates(max_world_size: int) -> Iterator[Candidate]:
    """Every combination of degrees of up to that many ranks, and every place of the weights.

    Weights that are split by stage or by column are not sharded besides: two ways to the same end.
    One GPU has no such choice: ComfyUI itself keeps in CPU memory what does not fit.
    """
    for world_size in range(1, max_world_size + 1):
        for degrees in _factorings(world_size, len(AXES)):
            plain = Candidate(weights="full", **dict(zip(AXES, degrees, strict=True)))
            yield plain
            if world_size > 1 and plain.pipefusion == plain.tensor == 1:
                for weights in WEIGHTS:
                    yield Candidate(**plain.degrees, weights=weights)


def _factorings(number: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    if num_factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorings(number // first, num_factors - 1):
                yield (first, *rest)
