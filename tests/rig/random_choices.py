"""Everything that is left to chance, from one seed.

Runs in: the tests (standard library only).
"""

from __future__ import annotations

import random
from typing import Any

TEXT = "a red old stone harbour lamp under grey sky with calm sea and three small boats"
WORDS = TEXT.split()


class Choices:
    """One seeded source of everything that is left to chance."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one(self, values: Any) -> Any:
        """Return one of several values."""
        return self._random.choice(values)

    def chance(self, probability: float) -> bool:
        """Return True in this part of all cases."""
        return self._random.random() < probability

    def number(self, low: float, high: float) -> float:
        """Return a number with two digits after the point."""
        return round(self._random.uniform(low, high), 2)

    def whole(self, low: int, high: int) -> int:
        """Return a whole number, both ends included."""
        return self._random.randint(low, high)

    def words(self, number: int) -> str:
        """Return a prompt."""
        return " ".join(self.one(WORDS) for _ in range(number))
