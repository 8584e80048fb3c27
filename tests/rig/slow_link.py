"""A link between CPU ranks that takes as long as one of given speed would: by waiting.

Runs in: a rank of a benchmark. What is exchanged really crosses, as it would without this; then
whoever waits for it waits until the link would have brought it. An exchange begins when the link is
free.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from comfy_xdit_patch.worker.ranks import collectives


@dataclass(frozen=True)
class Transfer:
    """One exchange on its way; it is there at ``end_s`` of the clock, and not before."""

    work: collectives.Work
    end_s: float

    def wait(self) -> None:
        """Wait for what was sent, and then for the link."""
        self.work.wait()
        time.sleep(max(0.0, self.end_s - time.perf_counter()))


class SlowLink:
    """One rank's link, each way.

    Args:
        bytes_per_s: of it; infinity for as fast as ranks exchange.
        latency_s: of each exchange.
    """

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0) -> None:
        self._bytes_per_s, self._latency_s = bytes_per_s, latency_s
        self._free_s = 0.0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have exchanges of tokens for heads go over it while this lasts."""
        begin = collectives.all_to_all_async

        def all_to_all_async(
            out: torch.Tensor, data: torch.Tensor, *, sent: Sequence[int], **others: Any
        ) -> Transfer:
            work = begin(out, data, sent=sent, **others)
            own = dist.get_rank(others["group"])
            num_bytes = (sum(sent) - sent[own]) * data.element_size()
            start_s = max(time.perf_counter(), self._free_s)
            self._free_s = start_s + self._latency_s + num_bytes / self._bytes_per_s
            return Transfer(work, self._free_s)

        with mock.patch.object(collectives, "all_to_all_async", all_to_all_async):
            yield
