"""Requests to the ranks of one start, and their replies.

Runs in: host process. One request at a time; ``crew.py`` sees to that.

A rank is *silent* when not even its heartbeat comes: its process is stopped, or so short of memory
that it does not run. The ranks are *stuck* when all hearts beat and nobody gets on: a collective
that one of them never enters, a driver that does not answer. What counts as getting on is a rank's
count of exchanges with other ranks (``worker/ranks/collectives.py``), a part of a load or of what
is compiled, or its reply.

How long nothing may happen follows from what was measured: ten times the slowest request of the
same kind and sizes, but never less than ``MIN_PATIENCE_S``, and XDIT_STEP_TIMEOUT at most, which is
also what an unmeasured kind gets.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy_xdit_patch.errors import ChannelClosedError, WorkerError
from comfy_xdit_patch.host.pool.launcher import Worker
from comfy_xdit_patch.host.pool.start import (
    POLL_S,
    SEND_DEADLINE_S,
    ask_where_it_is,
    dead_among,
    death_text,
    failure_text,
    hang_text,
    is_dead_and_silent,
)
from comfy_xdit_patch.wire.channel import frame_of, wait_readable
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.messages.replies import Alive, Failed, Loading, Raised, Reply, short
from comfy_xdit_patch.wire.messages.requests import Control, Decode, Fetch, Forward, RunBlock

RAISED_GRACE_S = 5.0
"""For a rank to raise what another one has raised: it is at most one exchange behind."""

Poll = Callable[[], None]
"""Called about every 20 ms in a wait; an exception it raises (an interrupt) ends the wait."""
Progress = Callable[[int, float], None]
"""Called with a rank and the part of a load that it has done."""

SILENCE_S = 10.0
"""Forty heartbeats. A thread that gets no CPU for this long is on a machine that does not work."""
MIN_PATIENCE_S = 20.0
SLACK = 10.0
STALL_S = 1.0
"""A host that did not look for this long was itself stopped: what it missed accuses nobody."""
REMEMBERED_KINDS = 64


class Exchange:
    """Every rank gets every request; a request is answered when every rank has answered."""

    def __init__(self, workers: Sequence[Worker], *, step_timeout_s: float) -> None:
        self._workers = tuple(workers)
        self._times = StepTimes(limit_s=step_timeout_s)
        self._patience_s = step_timeout_s
        self._request = 0
        self._kind: Hashable = None
        self._sent_s = 0.0
        self._outstanding: set[int] = set()
        self.bytes_sent = 0

    def settle(self, poll: Poll) -> None:
        """Wait for the replies to a request that the user interrupted."""
        if self._outstanding:
            self._collect(poll, lambda _, __: None)

    @property
    def next_number(self) -> int:
        """Of the request that is sent next."""
        return self._request + 1

    def send(self, message: Message, *, before: Sequence[tuple[Message, int | None]] = ()) -> None:
        """Send a request to every rank.

        Args:
            message: has ``next_number``.
            before: messages without a reply to send first, with file descriptors beside them.

        Raises:
            WorkerError: a rank died.
            DeadlineExceededError: a rank does not read.
        """
        self._request += 1
        self._kind = kind_of(message)
        self._patience_s = self._times.patience_s(self._kind)
        for extra, fd in before:
            self._send_all(extra, fd)
        self._sent_s = time.monotonic()
        self._send_all(message, None)
        self._outstanding = {worker.rank for worker in self._workers}

    def replies(self, poll: Poll, progress: Progress = lambda _, __: None) -> list[Reply]:
        """Return the replies to the request that was sent last, in rank order.

        Raises:
            WorkerError: a rank failed, died or hung.
        """
        replies = self._collect(poll, progress)
        self._times.add(self._kind, time.monotonic() - self._sent_s)
        return [replies[rank] for rank in sorted(replies)]

    def _send_all(self, message: Message, fd: int | None) -> None:
        frame = frame_of(message)
        for worker in self._workers:
            try:
                self.bytes_sent += worker.channel.send_frame(
                    frame, deadline_s=SEND_DEADLINE_S, fd=fd
                )
            except ChannelClosedError:
                raise WorkerError(death_text(worker, "between steps")) from None

    def _collect(self, poll: Poll, progress: Progress) -> dict[int, Reply]:
        """Wait until no reply is outstanding; return those to the latest request."""
        replies: dict[int, Reply] = {}
        by_channel = {worker.channel: worker for worker in self._workers}
        watch = Watch(
            [w.rank for w in self._workers], patience_s=self._patience_s, now=time.monotonic()
        )
        raised_s = math.inf
        while self._outstanding:
            waiting = [w.channel for w in self._workers if w.rank in self._outstanding]
            for channel in wait_readable(waiting, timeout_s=POLL_S):
                worker = by_channel[channel]
                reply = self._read(worker)
                if isinstance(reply, Alive):
                    watch.heard(worker.rank, reply.count, time.monotonic())
                elif isinstance(reply, Loading):
                    watch.heard(worker.rank, reply.done, time.monotonic())
                    progress(worker.rank, reply.done)
                elif reply is not None and getattr(reply, "request", None) == self._request:
                    watch.heard(worker.rank, math.inf, time.monotonic())
                    replies[worker.rank] = reply  # type: ignore[assignment]
                    self._outstanding.discard(worker.rank)
                    if isinstance(reply, Raised):
                        raised_s = min(raised_s, time.monotonic())
            self._check(watch)
            if time.monotonic() > raised_s + RAISED_GRACE_S:
                break
            poll()
        self._check_raised(replies)
        return replies

    def _check_raised(self, replies: Mapping[int, Reply]) -> None:
        """Raise WorkerError if ranks raised, and not all of them the same at the same place."""
        raised = {rank: reply for rank, reply in replies.items() if isinstance(reply, Raised)}
        places = {(reply.error, reply.num_exchanges) for reply in raised.values()}
        if raised and (len(raised) < len(self._workers) or len(places) > 1):
            rank, reply = min(raised.items())
            raise WorkerError(
                f"Rank {rank} raised an exception, and not every other rank the same: "
                f"{short(reply.error)}: {short(reply.text)}"
            )

    def _check(self, watch: Watch) -> None:
        """Raise WorkerError if a rank is dead or hangs."""
        for worker in self._workers:
            if worker.rank in self._outstanding and is_dead_and_silent(worker):
                raise WorkerError(death_text(worker, "during a request"))
        hanging = watch.hanging(self._outstanding, time.monotonic())
        if hanging is None:
            return
        worker = next(worker for worker in self._workers if worker.rank == hanging.rank)
        ask_where_it_is(worker)
        raise WorkerError(hang_text(worker, hanging.why))

    def _read(self, worker: Worker) -> Message | None:
        try:
            message = worker.channel.poll()
        except ChannelClosedError:
            raise WorkerError(death_text(worker, "during a request")) from None
        if isinstance(message, Failed):
            lost = dead_among(self._workers, worker)
            if lost is not None:
                raise WorkerError(death_text(lost, "during a request"))
            raise WorkerError(failure_text(worker, message))
        return message


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
    takes depends on what the disk and its cache are doing; and a call whose blocks run compiled may
    have to compile them again, which takes minutes.
    """
    if isinstance(message, Forward) and message.compiled is not None:
        return None
    if isinstance(message, (Forward, Control, RunBlock)):
        degrees = tuple(message.grid)
        if isinstance(message, RunBlock):
            return RunBlock, message.model, degrees, tuple(message.counts)
        return type(message), message.model, degrees, tuple(_shapes(message.arguments))
    if isinstance(message, Decode):
        return Decode, message.key, tuple(_shapes(message.latent))
    if isinstance(message, Fetch):
        return Fetch, message.model, tuple(message.counts)
    return None


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    if isinstance(tree, dict):
        if "$slot" in tree:
            return [tuple(tree["$slot"][3])]
        if "$numbers" in tree:
            return []
        return [shape for item in tree.values() for shape in _shapes(item)]
    return [shape for item in tree for shape in _shapes(item)] if isinstance(tree, list) else []
