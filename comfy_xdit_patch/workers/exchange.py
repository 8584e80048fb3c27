"""Requests to one generation of workers, and their replies.

Runs in: host process. One request at a time; ``pool.py`` sees to that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from comfy_xdit_patch.errors import ChannelClosedError, WorkerError
from comfy_xdit_patch.transport.channel import frame_of, wait_readable
from comfy_xdit_patch.transport.messages import Message
from comfy_xdit_patch.transport.replies import Alive, Failed, Loading, Raised, Reply, short
from comfy_xdit_patch.workers.launcher import Worker
from comfy_xdit_patch.workers.starting import (
    POLL_S,
    SEND_DEADLINE_S,
    ask_where_it_is,
    dead_among,
    death_text,
    failure_text,
    hang_text,
    is_dead_and_silent,
)
from comfy_xdit_patch.workers.watch import StepTimes, Watch, kind_of

RAISED_GRACE_S = 5.0
"""For a rank to raise what another one has raised: it is at most one exchange behind."""

Poll = Callable[[], None]
"""Called about every 20 ms in a wait; an exception it raises (an interrupt) ends the wait."""


class Exchange:
    """Every rank gets every request; a request is answered when every rank has answered."""

    def __init__(self, workers: Sequence[Worker], *, step_timeout_s: float) -> None:
        self._workers = tuple(workers)
        self._times = StepTimes(limit_s=step_timeout_s)
        self._patience_s = step_timeout_s
        self._request = 0
        self._outstanding: set[int] = set()
        self.bytes_sent = 0

    def settle(self, poll: Poll) -> None:
        """Wait for the replies to a request that the user interrupted."""
        self._collect(poll, lambda _, __: None)

    def request(
        self,
        message: Callable[[int], Message],
        *,
        before: Sequence[tuple[Message, int | None]],
        meanwhile: Callable[[], None],
        poll: Poll,
        progress: Callable[[int, float], None],
    ) -> list[Reply]:
        """Send messages and a request to every rank; return the replies in rank order.

        Args:
            message: makes the request from its number.
            before: messages without a reply to send first, with file descriptors beside them.
            meanwhile: runs once while the workers are at it.
            progress: called with a rank and the part of a load that it has done.

        Raises:
            WorkerError: a rank failed, died or hung.
            DeadlineExceededError: a rank does not read.
        """
        self._request += 1
        asked = message(self._request)
        kind = kind_of(asked)
        self._patience_s = self._times.patience_s(kind)
        for extra, fd in before:
            self._send_all(extra, fd)
        start = time.monotonic()
        self._send_all(asked, None)
        self._outstanding = {worker.rank for worker in self._workers}
        meanwhile()
        replies = self._collect(poll, progress)
        self._times.add(kind, time.monotonic() - start)
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

    def _collect(self, poll: Poll, progress: Callable[[int, float], None]) -> dict[int, Reply]:
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
