"""Which rank does what in one call, as plain numbers.

Runs in: host and worker. No torch, no ComfyUI: the same arithmetic on both sides, tested in
milliseconds.

One equation: ``batch * pipefusion * ring * ulysses * tensor == world_size``. Ranks form a grid in
which tensor varies fastest, then ulysses, ring, pipefusion, batch (``grid.py``): what talks most
sits closest.

    world_size 8, batch_degree 2, ulysses_degree 2, ring_degree 2
        rank 0..3   rows of the first half of the batch, its tokens in four shards
            0, 1    exchange tokens for heads with each other (ulysses), so do 2, 3
            0, 2    pass keys and values of the same heads on (ring), so do 1, 3
        rank 4..7   rows of the second half
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from comfy_xdit_patch.errors import PlanError
from comfy_xdit_patch.planning.grid import AXES, ranks_along
from comfy_xdit_patch.planning.sequence_shares import (
    SequenceShares,
    bounds,
    proportional,
    shard_sizes,
    weighted_shares,
)

NAMED = ("batch", "pipefusion", "ulysses", "ring", "tensor")
"""In the order in which a plan's name has them."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of one call of the diffusion model.

    ``num_reference_tokens`` come after the image's in one sequence with them.
    ``batch_size`` counts rows, conditional and unconditional alike.
    """

    batch_size: int
    num_text_tokens: int
    num_image_tokens: int
    num_heads: int
    is_batch_divisible: bool = True
    """Whether every tensor of the call has one row for each row of the batch."""
    num_reference_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """S, the whole sequence of one row."""
        return self.num_text_tokens + self.num_image_tokens + self.num_reference_tokens


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """The degrees of one call, and each rank's place in the grid."""

    world_size: int
    batch_degree: int
    ulysses_degree: int
    ring_degree: int = 1
    pipefusion_degree: int = 1
    tensor_degree: int = 1
    weights: tuple[int, ...] = ()
    """Relative speed of every rank; empty where all are equal."""

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or prod(self.grid) != self.world_size:
            factors = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, self.grid, strict=True))
            raise PlanError(f"{factors} is not world_size {self.world_size}.")
        if self.weights and (len(self.weights) != self.world_size or min(self.weights) < 1):
            raise PlanError(f"Weights {self.weights} for {self.world_size} ranks.")

    @classmethod
    def of_grid(cls, grid: Sequence[int], weights: Sequence[int]) -> ParallelPlan:
        """Make the plan that has these ``grid`` and ``weights``.

        Raises:
            PlanError: these are not degrees of all axes, or not the weights of all ranks.
        """
        if len(grid) != len(AXES):
            raise PlanError(f"{len(grid)} degrees for the axes {', '.join(AXES)}.")
        batch, pipefusion, ring, ulysses, tensor = grid
        return cls(prod(grid), batch, ulysses, ring, pipefusion, tensor, tuple(weights))

    @property
    def grid(self) -> tuple[int, ...]:
        """The degrees in the order of ``AXES``; how messages name a plan."""
        return (
            self.batch_degree,
            self.pipefusion_degree,
            self.ring_degree,
            self.ulysses_degree,
            self.tensor_degree,
        )

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """Ranks that differ in these axes only; every rank is in one of the tuples."""
        return ranks_along(self.grid, *axes)

    @property
    def name(self) -> str:
        """The plan as users write and read it, e.g. ``batch=2,ulysses=2,ring=2``."""
        return ",".join(f"{axis}={n}" for axis, n in self._axes) or "single"

    @property
    def strategy(self) -> str:
        """The names of the axes in use: ``batch``, ``ulysses``, ``batch+ring``..."""
        return "+".join(axis for axis, _ in self._axes) or "single"

    @property
    def is_exact(self) -> bool:
        """PipeFusion uses keys and values of the call before: its image is an approximation."""
        return self.pipefusion_degree == 1

    @property
    def _axes(self) -> list[tuple[str, int]]:
        degrees = dict(zip(AXES, self.grid, strict=True))
        return [(axis, degrees[axis]) for axis in NAMED if degrees[axis] > 1]

    @property
    def sequence_degree(self) -> int:
        """How many ranks share the tokens of one row."""
        return self.ulysses_degree * self.ring_degree

    def batch_index(self, rank: int) -> int:
        return rank // (self.world_size // self.batch_degree)

    def stage_index(self, rank: int) -> int:
        return rank // (self.sequence_degree * self.tensor_degree) % self.pipefusion_degree

    def sequence_index(self, rank: int) -> int:
        return rank // self.tensor_degree % self.sequence_degree

    def tensor_index(self, rank: int) -> int:
        return rank % self.tensor_degree

    def writes_rows(self, rank: int) -> bool:
        """Whether this rank writes its rows: of the ranks that end with the same rows, one does."""
        is_last_stage = self.stage_index(rank) + 1 == self.pipefusion_degree
        return is_last_stage and self.sequence_index(rank) == self.tensor_index(rank) == 0

    def local_heads(self, rank: int, num_heads: int) -> int:
        """Heads of a model that a rank's tensor group leaves to it, before tokens are shared."""
        return shard_sizes(num_heads, self.tensor_degree)[self.tensor_index(rank)]

    def batch_rows(self, rank: int, batch_size: int) -> tuple[int, int]:
        """First and end row of the batch that this rank computes."""
        rows = shard_sizes(batch_size, self.batch_degree)
        if self.weights and batch_size >= self.batch_degree:
            speeds = [sum(self.place_weights(i)) for i in range(self.batch_degree)]
            rows = proportional(batch_size, speeds, minimum=1)
        return bounds(rows)[self.batch_index(rank)]

    def place_weights(self, batch_index: int) -> tuple[int, ...]:
        """Weight of every place in a sequence group, for one part of the batch.

        At one place stand a rank of each stage, and all those that cut its weights: they have the
        same tokens, so the slowest of them counts.
        """
        if not self.weights:
            return (1,) * self.sequence_degree
        size = self.world_size // self.batch_degree
        ranks = range(batch_index * size, (batch_index + 1) * size)
        return tuple(
            min(self.weights[rank] for rank in ranks if self.sequence_index(rank) == place)
            for place in range(self.sequence_degree)
        )

    def sequence_shares(
        self,
        rank: int,
        *,
        num_text_tokens: int,
        num_image_tokens: int,
        num_reference_tokens: int = 0,
        num_heads: int,
    ) -> SequenceShares:
        """Share the tokens of a row among the ranks of the sequence group that a rank is in.

        Raises:
            PlanError: a rank would hold no text token or no image token.
        """
        return weighted_shares(
            num_text_tokens=num_text_tokens,
            num_image_tokens=num_image_tokens,
            num_reference_tokens=num_reference_tokens,
            num_heads=num_heads,
            weights=self.place_weights(self.batch_index(rank)),
            ring_degree=self.ring_degree,
        )

    def shares_of_counts(
        self, rank: int, counts: Sequence[int], *, num_heads: int
    ) -> SequenceShares:
        """The same for numbers of text, image and reference tokens, as one block is given them."""
        text, image, reference = counts
        return self.sequence_shares(
            rank,
            num_text_tokens=text,
            num_image_tokens=image,
            num_reference_tokens=reference,
            num_heads=num_heads,
        )
