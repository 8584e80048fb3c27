"""Where to look in tensors that are too large to be read whole.

Runs in: host and worker.
"""

from __future__ import annotations

import torch

NUM_SAMPLES = 2048
"""Places in each tensor."""


class Places:
    """Places to look at: a tensor is cut into pieces of one length, and one of each is chosen."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shifts = torch.rand(NUM_SAMPLES, generator=generator, dtype=torch.float64)
        self._pieces = torch.arange(NUM_SAMPLES, dtype=torch.float64) + shifts
        self._known: dict[int, torch.Tensor] = {}

    def of(self, size: int) -> torch.Tensor:
        """Return the places in a tensor of so many elements, at least ``NUM_SAMPLES``."""
        if size not in self._known:
            places = (self._pieces * (size / NUM_SAMPLES)).long()
            self._known[size] = places.clamp_(max=size - 1)
        return self._known[size]
