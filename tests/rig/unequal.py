"""Ranks of different speed, simulated: what shares of a FLUX step they would take how long for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from comfy_xdit_patch.planning.shares import adapted_weights, proportional

SPEEDS = ((1, 0.5), (1, 0.9), (1, 0.3), (1, 0.5, 1), (1, 1, 1, 0.5), (2, 1, 0.7, 0.4))
"""Relative speeds of the ranks that are tried."""

NUM_TOKENS = 4352
NUM_HEADS = 24
LINEAR_PART = 0.8
"""Of a FLUX.1 step at 1024 px; the rest is attention, which is shared by heads."""


class UnequalRanks:
    """Ranks whose speed the balance does not know. A second is the step of a rank of speed 1."""

    def __init__(self, *speeds: float, overhead_s: float = 0.0, noise: float = 0.0) -> None:
        """Set what no share changes, and by what part a measurement is off at random."""
        self.speeds, self.overhead_s, self.noise = speeds, overhead_s, noise
        self._chance = random.Random(0)

    def seconds(self, weights: Sequence[float]) -> list[float]:
        """Compute of each rank in one step."""
        tokens = proportional(NUM_TOKENS, weights, minimum=2)
        heads = proportional(NUM_HEADS, weights)
        return [
            self.overhead_s
            + (LINEAR_PART * t / NUM_TOKENS + (1 - LINEAR_PART) * h / NUM_HEADS)
            / speed
            * (1 + self._chance.uniform(-self.noise, self.noise))
            for t, h, speed in zip(tokens, heads, self.speeds, strict=True)
        ]

    def adapted(self, num_steps: int) -> tuple[float, ...]:
        """Weights after so many steps from an even split."""
        weights: tuple[float, ...] = (1.0,) * len(self.speeds)
        for _ in range(num_steps):
            weights = adapted_weights(weights, self.seconds(weights))
        return weights

    def efficiency(self, weights: Sequence[float]) -> float:
        """Ideal time over the time of the step, which is that of the slowest rank."""
        return (self.overhead_s + 1 / sum(self.speeds)) / max(self.seconds(weights))
