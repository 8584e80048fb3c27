"""Which exchanges are timed between ranks, and what their times say of the links.

Runs in: host and worker. No torch.

Ranks form a grid, so an axis of any plan of all ranks is a *grouping*: groups of ``degree`` ranks,
each ``stride`` from the next. There are few of them (3 for 4 ranks, 6 for 8), and timing each with
all of its groups at once measures what a plan would get, other groups' traffic included.

    4 ranks     degree 2 stride 1   (0, 1) (2, 3)
                degree 2 stride 2   (0, 2) (1, 3)
                degree 4 stride 1   (0, 1, 2, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from comfy_xdit_patch.planning.cost.machine import Link, LinkKind

Form = Literal["all_to_all", "pass_on", "all_gather"]
Grouping = tuple[int, int]
"""Degree and stride."""


@dataclass(frozen=True, slots=True)
class Timing:
    """``seconds = latency_s + bytes / bytes_per_s``; bytes are those that each rank sends."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


def groupings(world_size: int) -> list[Grouping]:
    """Every grouping of so many ranks, the largest groups first."""
    found = [
        (degree, stride)
        for degree in range(2, world_size + 1)
        for stride in range(1, world_size // degree + 1)
        if world_size % (degree * stride) == 0
    ]
    return sorted(found, key=lambda grouping: (-grouping[0], grouping[1]))


def groups_of(world_size: int, grouping: Grouping) -> list[tuple[int, ...]]:
    """The groups, each in the order of its ring."""
    degree, stride = grouping
    block = degree * stride
    return [
        tuple(range(start + offset, start + offset + block, stride))
        for start in range(0, world_size, block)
        for offset in range(stride)
    ]


def name_of(form: Form, grouping: Grouping) -> str:
    """The name of one measurement in a message."""
    return f"{form} {grouping[0]} {grouping[1]}"


def measurements(world_size: int) -> list[tuple[Form, Grouping]]:
    """All that are made. An all-gather is one of all ranks: of weights, and of the output."""
    every = groupings(world_size)
    forms: tuple[Form, ...] = ("all_to_all", "pass_on")
    found: list[tuple[Form, Grouping]] = [(form, grouping) for grouping in every for form in forms]
    return [*found, ("all_gather", every[0])] if every else []


def fit(points: Sequence[Sequence[float]]) -> Timing:
    """Fit latency and bandwidth to pairs of bytes and seconds, all above 0.

    Errors count relative to the time, so that small messages set the latency and large ones the
    bandwidth. Where the times are no such line (noise, or a cache that holds the small ones), the
    largest message has all of its time from its bytes.
    """
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_b = sum(w * b for w, (b, _) in zip(weights, points, strict=True)) / total
    mean_s = sum(w * s for w, (_, s) in zip(weights, points, strict=True)) / total
    spread = sum(w * (b - mean_b) ** 2 for w, (b, _) in zip(weights, points, strict=True))
    common = sum(w * (b - mean_b) * (s - mean_s) for w, (b, s) in zip(weights, points, strict=True))
    slope = common / spread if spread > 0 else 0.0
    latency = mean_s - slope * mean_b
    if slope <= 0 or latency < 0:
        largest = max(points, key=lambda point: point[0])
        return Timing(0.0, largest[0] / largest[1])
    return Timing(latency, 1 / slope)


def slowest(points_of_ranks: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """An exchange is over when every rank has it: of each size, the longest time."""
    return [
        [points[0][0], max(seconds for _, seconds in points)]
        for points in zip(*points_of_ranks, strict=True)
    ]


def links_of(
    world_size: int,
    timings: Mapping[tuple[Form, Grouping], Timing],
    kind_of: Callable[[int, int], LinkKind],
) -> tuple[tuple[Link, ...], ...]:
    """Make the links between ranks.

    A pair has the rates of the smallest groups that it is together in. A machine takes the slowest
    pair of a plan's groups, and among those is one that is in no smaller groups.
    """
    smallest: dict[tuple[int, int], Grouping] = {}
    for grouping in groupings(world_size):  # the largest first: smaller ones overwrite
        for group in groups_of(world_size, grouping):
            smallest |= {(a, b): grouping for a in group for b in group}
    whole = timings.get(("all_gather", (world_size, 1)))

    def link(a: int, b: int) -> Link:
        grouping = smallest[a, b]
        exchange, step = timings["all_to_all", grouping], timings["pass_on", grouping]
        ring = step.bytes_per_s
        if whole is not None and grouping == (world_size, 1):
            ring = min(ring, whole.bytes_per_s)
        return Link(kind_of(a, b), exchange.bytes_per_s, ring, exchange.latency_s, step.latency_s)

    if world_size == 1:
        return ((Link("host", 1.0, 1.0, 0.0),),)  # to itself, and never read
    return tuple(tuple(link(a, b) for b in range(world_size)) for a in range(world_size))
