"""Tell a rank that hangs from one that is slow.

Runs in: host process. No clock of its own, no process: ``exchange.py`` tells it what it hears.

A rank is *silent* when not even its heartbeat comes: its process is stopped, or so short of memory
that it does not run. The ranks are *stuck* when all hearts beat and nobody gets on: a collective
that one of them never enters, a driver that does not answer. What counts as getting on is a rank's
count of exchanges with other ranks (``engine/collectives.py``), a part of a load, or its reply.

How long nothing may happen follows from what was measured: ten times the slowest request of the
same kind and sizes, but never less than ``MIN_PATIENCE_S``, and XDIT_STEP_TIMEOUT at most, which is
also what an unmeasured kind gets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from comfy_xdit_patch.transport.calls import Control, Fetch, Forward, RunBlock
from comfy_xdit_patch.transport.messages import Message

SILENCE_S = 10.0
"""Forty heartbeats. A thread that gets no CPU for this long is on a machine that does not work."""
MIN_PATIENCE_S = 20.0
SLACK = 10.0
STALL_S = 1.0
"""A host that did not look for this long was itself stopped: what it missed accuses nobody."""
REMEMBERED_KINDS = 64


class StepTimes:
    """The slowest request of each kind, of the kinds used last."""

    def __init__(self, *, limit_s: float) -> None:
        self._limit_s = limit_s
        self._slowest: OrderedDict[Hashable, float] = OrderedDict()

    def add(self, kind: Hashable, seconds: float) -> None:
        """Note what a request took. None is no kind."""
        if kind is None:
            return
        self._slowest[kind] = max(seconds, self._slowest.pop(kind, 0.0))
        while len(self._slowest) > REMEMBERED_KINDS:
            self._slowest.popitem(last=False)

    def patience_s(self, kind: Hashable) -> float:
        """How long a request of this kind may go on without any progress."""
        if kind not in self._slowest:
            return self._limit_s
        return min(self._limit_s, max(MIN_PATIENCE_S, SLACK * self._slowest[kind]))


@dataclass(frozen=True, slots=True)
class Hanging:
    """Which rank keeps the others waiting, and how that is known."""

    rank: int
    why: str


class Watch:
    """What was heard of each rank during one request."""

    def __init__(self, ranks: Iterable[int], *, patience_s: float, now: float) -> None:
        self._heard = dict.fromkeys(ranks, now)
        self._counts: dict[int, float] = dict.fromkeys(self._heard, 0.0)
        self._moved = now
        self._looked = now
        self._patience_s = patience_s

    def heard(self, rank: int, count: float, now: float) -> None:
        """A rank said something; ``count`` is how far it is."""
        self._heard[rank] = now
        if self._counts[rank] != count:
            self._counts[rank] = count
            self._moved = now

    def hanging(self, outstanding: Collection[int], now: float) -> Hanging | None:
        """Return the rank that hangs, if one of those that did not answer yet does. Call often."""
        stalled_s = now - self._looked
        self._looked = now
        if stalled_s > STALL_S:
            self._moved += stalled_s
            self._heard = {rank: then + stalled_s for rank, then in self._heard.items()}
        if not outstanding:
            return None
        rank = min(outstanding, key=lambda rank: (self._heard[rank], rank))
        if now - self._heard[rank] > SILENCE_S:
            return Hanging(rank, f"was not heard of for {SILENCE_S:.0f} s")
        if now - self._moved > self._patience_s:
            # Whoever is behind is who the others wait for. GPU ranks count what they have issued,
            # which may be all of the call on each of them: then nobody knows who it is.
            least = min(self._counts[rank] for rank in outstanding)
            rank, *others = sorted(r for r in outstanding if self._counts[r] == least)
            alike = f", nor did ranks {', '.join(map(str, others))}" if others else ""
            return Hanging(rank, f"did not get on for {self._patience_s:.0f} s{alike}")
        return None


def kind_of(message: Message) -> Hashable:
    """What decides how long a computation takes: model, shapes, degrees. None for other requests.

    Weights of ranks do not: they move by little, and a new kind has no measured times. What a load
    takes depends on what the disk and its cache are doing.
    """
    if isinstance(message, (Forward, Control, RunBlock)):
        degrees = tuple(message.grid)
        if isinstance(message, RunBlock):
            return RunBlock, message.model, degrees, tuple(message.counts)
        return type(message), message.model, degrees, tuple(_shapes(message.arguments))
    if isinstance(message, Fetch):
        return Fetch, message.model, tuple(message.counts)
    return None


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    if isinstance(tree, dict):
        if "$slot" in tree:
            return [tuple(tree["$slot"][3])]
        return [shape for item in tree.values() for shape in _shapes(item)]
    return [shape for item in tree for shape in _shapes(item)] if isinstance(tree, list) else []
