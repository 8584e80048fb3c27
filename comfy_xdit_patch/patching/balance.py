"""The weights of the ranks, for every call: from the pool's balance, or as a run holds them.

Runs in: host process.

Weights change after a call of the model, never between a ControlNet's call and the model's: its
residuals lie on the ranks by the shares that it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.left_over import LeftOver
from comfy_xdit_patch.planning.balance import Balance, Replan
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.strategy import Balancing
from comfy_xdit_patch.workers.pool import Pool

if TYPE_CHECKING:
    from comfy_xdit_patch.patching.run import Run


class PoolBalance:
    """The balance of the workers that live now."""

    def __init__(self, mode: Balancing, pool: Pool, totals: Totals) -> None:
        self._mode = mode
        self._pool = pool
        self._totals = totals
        self._left_over = LeftOver(pool) if mode == "least_loaded" else None
        self._begin()

    def _begin(self) -> None:
        self._generation = self._pool.generation
        self.current = Balance(self._mode, self._pool.world_size)

    def weights(self, run: Run) -> tuple[int, ...]:
        """Weights for the next call of a run."""
        if self._generation != self._pool.generation:
            self._begin()
        if not run.is_balanced:
            run.is_balanced = True
            if self._left_over is not None:
                self.current.follow(self._left_over.parts())
            self._say()
        return self.current.weights if run.weights is None else run.weights

    @property
    def is_at_rest(self) -> bool:
        """Whether what calls take now tells what they will take: shares are not still sought."""
        return self.current.is_at_rest

    def hold(self, run: Run, weights: tuple[int, ...]) -> None:
        """Leave the weights of a run as they are until it ends."""
        run.weights = weights

    def measured(
        self, plan: ParallelPlan, workload: Workload, *, model: int, replan: Replan
    ) -> None:
        """Learn from the busy seconds of the call that was made last, if GPUs were busy in them."""
        if any(self._totals.launch_bound.values()):
            return
        busy_s: Sequence[float] = [
            self._totals.busy_seconds.get(rank, 0.0) for rank in range(plan.world_size)
        ]
        kind = model, workload
        if self.current.measured(plan, workload, busy_s, kind=kind, replan=replan):
            if self._left_over is not None:
                self.current.learned_under(self._left_over.parts())
            self._say()

    def _say(self) -> None:
        self._totals.weights = self.current.weights
        self._totals.share_changes = self.current.num_changes
