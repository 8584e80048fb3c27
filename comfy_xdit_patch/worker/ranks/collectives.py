"""Every exchange of tensors between ranks, and the count of them.

Runs in: worker process.

Every exchange begins in here and is counted. The count tells the host how far a rank is, and in a
hang, which rank is behind. Not every exchange ends in here: PipeFusion's stages wait for the tokens
that they send and receive (``pipefusion/stage.py``), and on CUDA whatever waits for the device
waits for the exchanges on it too, such as the copy of a result or the measurement of the links.

The clock is told of the waits that begin in here, but not of ``all_reduce_sum``: the ranks of a
tensor group have one speed, that of the slowest of them. It is not told of a stage's waits either:
a plan with PipeFusion shares nothing by speed.

How long a rank computes, without what it waits for:
    CPU     seconds outside of exchanges. A core that another program takes part of counts: the rank
            is as slow as that.
    CUDA    a pair of events around every exchange, on the stream that computes: their distance is
            how long the stream stood still. They are read when the result has been copied out,
            which the host waits for anyway, or with a later call where nothing is copied out.
            Where the CPU issues kernels more slowly than the GPU computes them, events measure the
            CPU: shares of the work change nothing about that.
    graphs  The events of a CUDA graph are external ones, recorded anew by each replay. So replays
            are measured as calls are; the count of exchanges grows by all of a graph's at once.

A rank is a process, which computes one call at a time. So the clock and the counts below are the
process's: new ranks are new processes, and begin at 0. The heartbeat's thread reads the count of
what was begun, and changes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
import torch.distributed as dist

from comfy_xdit_patch.worker.ranks.mailboxes import Exchange, Mailboxes, span_of, spans

Event = torch.cuda.Event
Wait: TypeAlias = tuple[Event, Event]
LAUNCH_PART = 0.8
"""Part of a call's time that the CPU takes to issue it, from which on the CPU sets the pace."""


@dataclass(slots=True)
class _Call:
    """The events of one call: its ends, and those of every wait in it."""

    first: Event
    last: Event
    waits: list[Wait] = field(default_factory=list)
    replayed: Sequence[Wait] = ()
    """The waits of a graph that the call replayed; their events stay the graph's."""

    @property
    def is_done(self) -> bool:
        return bool(self.last.query())  # type: ignore[no-untyped-call]

    @property
    def busy_s(self) -> float:
        waits = chain(self.waits, self.replayed)
        waited_ms = sum(first.elapsed_time(last) for first, last in waits)
        return max(0.0, float(self.first.elapsed_time(self.last) - waited_ms) / 1e3)


class BusyClock:
    """One rank's clock; ``collectives.py`` tells it when the rank waits."""

    def __init__(self) -> None:
        self._start_s = 0.0
        self._waited_s = 0.0
        self._call: _Call | None = None
        self._ended: deque[_Call] = deque()
        self._spare: list[Event] = []
        self._launch_s = 0.0
        self._captured: list[Wait] | None = None
        self.is_launch_bound = False
        """Whether the CPU set the pace of the call that was copied out last."""

    def start(self, device: torch.device) -> None:
        """Begin a call that computes on this device. A call that failed is forgotten."""
        self._waited_s = 0.0
        self._start_s = time.perf_counter()
        self._call = None
        if device.type == "cuda":
            self._call = _Call(self._recorded(), self._event())

    def launched(self) -> None:
        """Note that everything is issued: what comes now waits for the device."""
        self._launch_s = time.perf_counter() - self._start_s

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that this lasts as a wait for other ranks."""
        start_s = time.perf_counter()
        first = None if self._call is None else self._recorded()
        yield
        self._waited_s += time.perf_counter() - start_s
        if self._call is not None and first is not None:
            waits = self._call.waits if self._captured is None else self._captured
            waits.append((first, self._recorded()))

    @contextmanager
    def capturing(self, waits: list[Wait]) -> Iterator[None]:
        """Have what waits while this lasts noted as a graph's, whose replays record it."""
        self._captured = waits
        try:
            yield
        finally:
            self._captured = None

    def replayed(self, waits: Sequence[Wait]) -> None:
        """Count the waits of a graph that this call replayed. One call replays one graph."""
        if self._call is not None:
            self._call.replayed = waits

    def stop(self, *, is_copied_out: bool) -> float:
        """End the call; return its busy seconds.

        Args:
            is_copied_out: the result was, by a rank of this group at least, so that a CUDA device
                is done or about to be. Otherwise what is returned is that of the calls which are
                done by now, and the rest comes with a later one.
        """
        return self.halt(is_copied_out=is_copied_out)()

    def halt(self, *, is_copied_out: bool) -> Callable[[], float]:
        """End the call, and wait as ``stop`` does; return what tells its busy seconds.

        That asks the driver for each event of the call. The clock must not be started before.
        """
        call, self._call = self._call, None
        if call is None:
            busy_s = max(0.0, time.perf_counter() - self._start_s - self._waited_s)
            return lambda: busy_s
        call.last.record()
        self._ended.append(call)
        if is_copied_out:
            call.last.synchronize()
        return partial(self._read, call, is_copied_out=is_copied_out)

    def _read(self, call: _Call, *, is_copied_out: bool) -> float:
        if is_copied_out:
            took_s = float(call.first.elapsed_time(call.last)) / 1e3
            self.is_launch_bound = self._launch_s > LAUNCH_PART * took_s
        busy_s = 0.0
        while self._ended and self._ended[0].is_done:
            ended = self._ended.popleft()
            if ended is call or not is_copied_out:
                busy_s += ended.busy_s
            # Making events takes longer than recording them.
            self._spare += [ended.first, ended.last, *chain(*ended.waits)]
        return busy_s

    def _recorded(self) -> Event:
        event = self._event()
        event.record()
        return event

    def _event(self) -> Event:
        if self._captured is not None:
            # An event that is not external ties streams together in a graph and has no time.
            return Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]
        if self._spare:
            return self._spare.pop()
        return Event(enable_timing=True)  # type: ignore[no-untyped-call]


Work = dist.Work | Exchange
clock = BusyClock()
mailboxes: Mailboxes | None = None
"""Where CPU ranks exchange what they do not add up; ``groups.py`` sets it."""
_num_begun = 0
_num_open = 0


def num_begun() -> int:
    """How many exchanges this process has begun, in all groups."""
    return _num_begun


def is_in_one() -> bool:
    """Whether an exchange was begun and not ended: it failed, or nobody has waited for it yet.

    A stage's (``stage.py``) are not counted: what one sends, another one receives.
    """
    return _num_open > 0


@dataclass(slots=True)
class Captured:
    """The exchanges of a CUDA graph."""

    num_begun: int = 0
    waits: list[Wait] = field(default_factory=list)


@contextmanager
def capturing() -> Iterator[Captured]:
    """Note the exchanges that a graph captures while this lasts: none of them is made by that.

    What is begun counts all the same: to capture is to get on.
    """
    global _num_open
    captured, begun, still_open = Captured(), _num_begun, _num_open
    try:
        with clock.capturing(captured.waits):
            yield captured
        captured.num_begun = _num_begun - begun
    finally:
        _num_open = still_open


def replayed(captured: Captured) -> None:
    """Count what a graph exchanges, once more."""
    global _num_begun
    _num_begun += captured.num_begun
    clock.replayed(captured.waits)


def all_to_all_async(
    out: torch.Tensor,
    data: torch.Tensor,
    *,
    received: Sequence[int],
    sent: Sequence[int],
    group: dist.ProcessGroup,
) -> Work:
    """Begin to send a part of ``data`` to every rank and to fill ``out`` with what they send.

    Sizes are elements. ``finish`` the work before ``data`` is changed or ``out`` is read.
    """
    _begin()
    if mailboxes is not None:
        ranks = dist.get_process_group_ranks(group)
        return mailboxes.begin(
            spans(data, sent, ranks), spans(out, received, ranks), kept=(out, data)
        )
    work: dist.Work = dist.all_to_all_single(
        out, data, list(received), list(sent), group=group, async_op=True
    )
    return work


def all_gather_into(whole: torch.Tensor, shard: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    """Fill ``whole`` with the shards of all ranks."""
    finish([all_gather_into_async(whole, shard, group=group)])


def all_gather_into_async(
    whole: torch.Tensor, shard: torch.Tensor, *, group: dist.ProcessGroup
) -> Work:
    """Begin the same; ``finish`` the work before the tensors are used."""
    _begin()
    if mailboxes is not None:
        ranks = dist.get_process_group_ranks(group)
        sent = [span_of(shard, rank) for rank in ranks]
        parts = spans(whole, [shard.numel()] * len(ranks), ranks)
        return mailboxes.begin(sent, parts, kept=(whole, shard))
    work: dist.Work = dist.all_gather_into_tensor(whole, shard, group=group, async_op=True)
    return work


def pass_on_async(
    out: torch.Tensor, data: torch.Tensor, *, to: int, source: int, group: dist.ProcessGroup
) -> list[Work]:
    """Begin to send ``data`` to one rank of the group and to fill ``out`` from another.

    ``finish`` all the works before ``data`` is changed or ``out`` is read.
    """
    return _between_pairs([(to, data)], [(source, out)], group)


def swap_async(
    edges: Sequence[tuple[int, torch.Tensor, torch.Tensor]], *, group: dist.ProcessGroup
) -> list[Work]:
    """Begin to send a tensor to each of some ranks of the group, and to fill one from each.

    ``finish`` all the works before what is sent is changed or what is filled is read.

    Args:
        edges: a rank, what it is sent, and what is filled from it.
    """
    sent, received = [edge[:2] for edge in edges], [(edge[0], edge[2]) for edge in edges]
    return _between_pairs(sent, received, group)


def send_async(data: torch.Tensor, *, to: int, group: dist.ProcessGroup) -> dist.Work:
    """Begin to send to one rank of the group; keep ``data`` as it is until the work is done."""
    _count()
    work = dist.isend(data, dist.get_global_rank(group, to), group)
    assert work is not None, "this rank is not in the group"
    return work


def receive_async(out: torch.Tensor, *, source: int, group: dist.ProcessGroup) -> dist.Work:
    """Begin to fill ``out`` from one rank of the group."""
    _count()
    work = dist.irecv(out, dist.get_global_rank(group, source), group)
    assert work is not None, "this rank is not in the group"
    return work


def all_reduce_sum(data: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    """Make ``data`` the sum of that of all ranks of the group."""
    _begin()
    dist.all_reduce(data, op=dist.ReduceOp.SUM, group=group)
    _end()


def all_reduce_max(value: torch.Tensor) -> None:
    """Make ``value`` the largest that any rank of the world has."""
    _begin()
    with clock.waiting():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    _end()


def finish(works: Iterable[Work]) -> None:
    """Wait for one exchange that was begun. On CUDA the stream waits, not the CPU."""
    with clock.waiting():
        for work in works:
            work.wait()
    _end()


def _between_pairs(
    sent: Sequence[tuple[int, torch.Tensor]],
    received: Sequence[tuple[int, torch.Tensor]],
    group: dist.ProcessGroup,
) -> list[Work]:
    """Begin to send tensors to ranks of the group, and to fill others from them."""
    _begin()
    sent, received = (
        [(dist.get_global_rank(group, rank), data) for rank, data in pairs]
        for pairs in (sent, received)
    )
    if mailboxes is not None:
        parts = ([span_of(data, rank) for rank, data in pairs] for pairs in (sent, received))
        return [mailboxes.begin(*parts, kept=[data for _, data in (*sent, *received)])]
    ops = [dist.P2POp(dist.isend, data, rank, group) for rank, data in sent]
    ops += [dist.P2POp(dist.irecv, out, rank, group) for rank, out in received]
    return [*dist.batch_isend_irecv(ops)]


def _count() -> None:
    global _num_begun
    _num_begun += 1


def _begin() -> None:
    global _num_open
    _count()
    _num_open += 1


def _end() -> None:
    global _num_open
    _num_open -= 1
