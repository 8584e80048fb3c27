"""The grid of ranks: which of them share an axis of a plan.

Runs in: host, worker and the command line's process.

Tensor varies fastest, then ulysses, ring, pipefusion, batch: what talks most sits closest. It is
the order "tp-sp-pp-cfg-dp" of xfuser's ``RankGenerator``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

AXES = ("batch", "pipefusion", "ring", "ulysses", "tensor")
"""Slowest first."""


def ranks_along(degrees: Sequence[int], *axes: str) -> list[tuple[int, ...]]:
    """Ranks that differ in these axes only, one tuple for each collective that runs at once.

    Args:
        degrees: of every one of ``AXES``.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(product(*map(range, degrees))):
        others = tuple(i for axis, i in zip(AXES, place, strict=True) if axis not in axes)
        found.setdefault(others, []).append(rank)
    return [tuple(ranks) for ranks in found.values()]
