"""What is known of one sampling run.

Runs in: host process.

A run has streams, for PipeFusion: the calls that follow each other on the way to one
image, the conditional ones, say. A stream's first calls are exact ("warm-up") and leave keys and
values on the ranks; later ones use those of the call before for the tokens that have not come yet.
That is good only as long as the call before was nearly the same: a stream begins anew whenever
anything but the latent and sigma changes.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.host.reading.models import KnownModel
from comfy_xdit_patch.planning.pipeline import NUM_WARM_UP_CALLS
from comfy_xdit_patch.report.status import RunCounts
from comfy_xdit_patch.wire.fingerprint import prescribed_attention

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


@dataclass(eq=False)
class Run:
    """One sampling run. A refusal of scope RUN holds until its end.

    What holds for its ranks only is kept in their crew, by run.
    """

    model: Any = None
    """The ``BaseModel`` that is sampled, if it is one for the workers."""
    since_unix_s: float = field(default_factory=time.time)
    num_calls: int = 0
    counts: RunCounts = field(default_factory=RunCounts)
    refusal: Refusal | None = None
    in_use: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """The model that is sampled, and those that the workers run for it."""
    models: dict[int, KnownModel] = field(default_factory=dict)
    """Models of this run as the workers know them, by the identity of their BaseModel."""
    changes: dict[int, list[Refusal]] = field(default_factory=dict)
    """What others hung on single modules of them."""
    objects: dict[int, tuple[Any, int]] = field(default_factory=dict)
    """Objects of nodes that keep state, with their numbers for the workers."""
    prescribed: dict[int, bool] = field(default_factory=dict)
    """Whether checkpoints prescribe an attention function, by the identity of the module."""
    tensor: dict[tuple[int, int], Refusal | None] = field(default_factory=dict)
    """Why their weights cannot be cut into so many parts."""
    needs_residuals: bool = False
    """Steps of this run are computed here in part or in whole, and so need ControlNets here."""
    bypass: dict[int, dict[str, list[Any]]] = field(default_factory=dict)
    """ComfyUI's bypass hooks on them."""
    is_around: bool = False
    """A call of a model's ``forward`` is being computed, with its blocks on the workers."""
    paced: set[Hashable] = field(default_factory=set)
    """Kinds of calls that ``auto`` has seen in it."""
    is_balanced: bool = False
    """Its first call was made, and shares follow what others use of the devices."""
    weights: tuple[int, ...] | None = None
    """Those that this run keeps, if it must keep them."""

    @property
    def is_flux(self) -> bool:
        """Whether a model of the family is sampled."""
        return self.model is not None

    def is_prescribed(self, module: Any) -> bool:
        """Whether a checkpoint prescribes an attention function for this model or ControlNet."""
        if id(module) not in self.prescribed:  # All modules are looked at: not in every step.
            self.prescribed[id(module)] = bool(prescribed_attention(module))
        return self.prescribed[id(module)]
