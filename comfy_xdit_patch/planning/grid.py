"""The grid of ranks: which of them share an axis of a plan.

Runs in: host, worker and the command line's process.

Tensor varies fastest, then ulysses, ring, pipefusion, batch: what talks most sits closest. It is
the order "tp-sp-pp-cfg-dp" of xfuser's ``RankGenerator``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

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


def num_communicators(degrees: Sequence[int]) -> int:
    """How many communicators a rank has when it has made a call, without that of weight shards.

    One of all ranks, in which they first meet; one for each axis on which there are others, unless
    that is all ranks; and what passes from stage to stage has one for each neighbour.

    Args:
        degrees: of every one of ``AXES``.
    """
    _, pipefusion, ring, ulysses, tensor = degrees
    axes = [ring * ulysses, tensor]
    if ring > 1 and ulysses > 1:
        axes += [ring, ulysses]
    apart = sum(1 < degree < prod(degrees) for degree in axes)
    return 1 + apart + min(pipefusion - 1, 2)
