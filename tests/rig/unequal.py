"""Ranks of different speed, simulated: what calls of FLUX.1 at 1024 px take under a balance.

Runs in: pytest and ``planning_tables.py``; no ComfyUI, no rank.
"""

from __future__ import annotations

import random
from functools import partial

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.balance import Balance, work_parts
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.planner import plan_call
from comfy_xdit_patch.planning.strategy import AUTO, Strategy

SPEEDS = ((1, 0.5), (1, 0.9), (1, 0.3), (1, 0.5, 1), (1, 1, 1, 0.5), (2, 1, 0.7, 0.4))
"""Relative speeds of the ranks that are tried."""

IMAGE = Workload(batch_size=1, num_text_tokens=256, num_image_tokens=4096, num_heads=24)


class Ranks:
    """Ranks whose speed the balance does not know. A second is the call of a rank of speed 1."""

    def __init__(
        self,
        balance: Balance,
        *speeds: float,
        strategy: Strategy = AUTO,
        noise: float = 0.0,
        fixed_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Prepare; ``fixed_s`` is what no share divides, ``noise`` a part of each measurement."""
        self.balance, self.speeds, self.strategy = balance, list(speeds), strategy
        self.noise, self.fixed_s = noise, fixed_s
        self.times: list[float] = []
        """Of every call: the busy seconds of its slowest rank."""
        self._chance = random.Random(seed)

    def plan(self, workload: Workload, weights: tuple[int, ...]) -> ParallelPlan:
        plan = plan_call(
            workload, world_size=len(self.speeds), strategy=self.strategy, weights=weights
        )
        assert not isinstance(plan, Refusal), plan.reason
        return plan

    def busy(self, plan: ParallelPlan, workload: Workload) -> list[float]:
        return [
            self.fixed_s + part / speed * (1 + self._chance.gauss(0, self.noise))
            for part, speed in zip(work_parts(plan, workload), self.speeds, strict=True)
        ]

    def run(self, num_calls: int, workload: Workload = IMAGE) -> Ranks:
        for _ in range(num_calls):
            plan = self.plan(workload, self.balance.weights)
            busy = self.busy(plan, workload)
            self.times.append(max(busy))
            replan = partial(self.plan, workload)
            self.balance.measured(plan, workload, busy, kind=workload, replan=replan)
        return self

    @property
    def efficiency(self) -> float:
        """Ideal time over that of the last call."""
        return (self.fixed_s + 1 / sum(self.speeds)) / self.times[-1]
