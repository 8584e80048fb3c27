"""Which calls of a sampling run PipeFusion may approximate, and which must be exact.

Runs in: host process.

A stream is the calls that follow each other on the way to one image: the conditional ones, say.
Its first calls are exact ("warm-up") and leave keys and values on the ranks; later ones use those
of the call before for the tokens that have not come yet. That is good only as long as the call
before was nearly the same: a stream begins anew whenever anything but the latent and sigma changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from comfy_xdit_patch.planning.pipeline import NUM_WARM_UP_CALLS

CLOSE = 1e-4
"""Sigmas that differ by a smaller part are one: they pass through float32 and other formulas."""


@dataclass(slots=True)
class Stream:
    """One stream. ``state`` is all that must stay as it is from call to call."""

    number: int
    state: object = None
    sigma: float = 0.0
    num_calls: int = 0


@dataclass(slots=True)
class Streams:
    """The streams of one sampling run, by what tells their calls apart."""

    num_warm_up_calls: int = NUM_WARM_UP_CALLS
    _streams: dict[object, Stream] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """Of all streams; the ranks may keep something for each."""
        return [stream.number for stream in self._streams.values()]

    def clear(self) -> None:
        self._streams.clear()

    def of(self, key: object, number: int) -> Stream:
        """Return the stream of a key; a new one gets this number."""
        return self._streams.setdefault(key, Stream(number))

    def is_warm_up(
        self, stream: Stream, *, state: object, sigma: float, schedule: Sequence[float]
    ) -> bool:
        """Whether a stream's next call must be exact. Counts the call.

        Args:
            state: what must be as in the call before: shapes, conditioning, weights, plan...
            sigma: of the call. Rising, it is another denoising than before.
            schedule: sigmas of the run. If one of them lies between the call before and this one,
                its step was not computed on the ranks, and what they keep is too old.
        """
        is_first = stream.num_calls == 0 or stream.state != state
        is_old = any(sigma * (1 + CLOSE) < s < stream.sigma * (1 - CLOSE) for s in schedule)
        if is_first or is_old or sigma > stream.sigma * (1 + CLOSE):
            stream.num_calls = 0
        stream.state, stream.sigma = state, sigma
        stream.num_calls += 1
        return stream.num_calls <= self.num_warm_up_calls
