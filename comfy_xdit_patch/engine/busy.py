"""How long this rank computes in a call, without what it waits for others in exchanges.

Runs in: worker process.

    CPU     seconds outside of exchanges. A core that another program takes part of counts: the rank
            is as slow as that.
    CUDA    a pair of events around every exchange, on the stream that computes: their distance is
            how long the stream stood still. They are read when the result has been copied out,
            which the host waits for anyway, or with a later call where nothing is copied out.

Only one call runs at a time, so there is one clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class _Call:
    """The events of one call: its ends, and those of every wait in it."""

    first: torch.cuda.Event
    last: torch.cuda.Event | None = None
    waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)


class BusyClock:
    """One rank's clock; ``collectives.py`` tells it when the rank waits."""

    def __init__(self) -> None:
        self._start_s = 0.0
        self._waited_s = 0.0
        self._call: _Call | None = None
        self._ended: deque[_Call] = deque()
        self._spare: list[torch.cuda.Event] = []

    def start(self, device: torch.device) -> None:
        """Begin a call that computes on this device. A call that failed is forgotten."""
        self._waited_s = 0.0
        self._start_s = time.perf_counter()
        self._call = _Call(self._record()) if device.type == "cuda" else None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Take what is done in here for a wait."""
        start = time.perf_counter()
        first = None if self._call is None else self._record()
        yield
        self._waited_s += time.perf_counter() - start
        if self._call is not None and first is not None:
            self._call.waits.append((first, self._record()))

    def stop(self, *, is_copied_out: bool) -> float:
        """End the call; return its busy seconds.

        Args:
            is_copied_out: the result was, on a rank of the same group at least, so that a CUDA
                device is done or about to be. Otherwise what is returned is that of earlier calls
                that are done by now, and the rest comes with a later one.
        """
        if self._call is None:
            return max(0.0, time.perf_counter() - self._start_s - self._waited_s)
        self._call.last = self._record()
        self._ended.append(self._call)
        self._call = None
        busy_ms = 0.0
        while self._ended:
            call = self._ended[0]
            assert call.last is not None
            if is_copied_out:
                call.last.synchronize()
            elif not call.last.query():  # type: ignore[no-untyped-call]
                break
            self._ended.popleft()
            busy_ms += call.first.elapsed_time(call.last)
            busy_ms -= sum(first.elapsed_time(last) for first, last in call.waits)
            # Making events takes longer than recording them.
            self._spare += [call.first, call.last]
            self._spare += [event for pair in call.waits for event in pair]
        return max(0.0, busy_ms / 1e3)

    def _record(self) -> torch.cuda.Event:
        if self._spare:
            event = self._spare.pop()
        else:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
