"""One way to share the work, and all ways there are.

Runs in: the command line's process.

``grid.py`` says which ranks share an axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from comfy_xdit_patch.planning.grid import AXES, Degrees
from comfy_xdit_patch.planning.residency import Mode


@dataclass(frozen=True, slots=True)
class Candidate(Degrees):
    """Degrees of every axis, and where the weights lie."""

    weights: Mode = field(default="full", kw_only=True)

    @property
    def name(self) -> str:
        """As users write and read it, e.g. ``batch=2,ulysses=2,fsdp=4``."""
        plain = Degrees(*self.grid).name
        if self.weights == "full":
            return plain
        return f"{plain},{'fsdp' if self.weights == 'sharded' else 'offload'}={self.world_size}"


SINGLE = Candidate()


def candidates(max_world_size: int) -> Iterator[Candidate]:
    """Every combination of degrees of up to that many ranks, and every place of the weights.

    Weights that are split by stage or by column are not sharded besides: two ways to the same end.
    One GPU has no such choice: ComfyUI itself keeps in CPU memory what does not fit.
    """
    for world_size in range(1, max_world_size + 1):
        for degrees in _factorings(world_size, len(AXES)):
            plain = Candidate(*degrees)
            yield plain
            if world_size > 1 and plain.pipefusion == plain.tensor == 1:
                yield Candidate(*degrees, weights="sharded")
                yield Candidate(*degrees, weights="offload")


def _factorings(number: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    if num_factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorings(number // first, num_factors - 1):
                yield (first, *rest)
