"""What a worker says to the host.

Runs in: host and worker. No torch. See ``codec.py`` for the other direction and the encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

MAX_TEXT_CHARS = 2000
FloatDtype: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]
"""Names of torch's."""


def short(text: str) -> str:
    """Cut a worker's text to what may reach ComfyUI's log."""
    return text[:MAX_TEXT_CHARS]


@dataclass(frozen=True, slots=True)
class Joined:
    """The rank is in the process group. Seconds by phase; memory of its GPU, 0 for a CPU rank.

    ``free_bytes`` is what is left with the rank and its groups there, of which the first exchange
    took ``group_bytes``, or somebody else did meanwhile.
    """

    rank: int
    pid: int
    device: str
    seconds: dict[str, float]
    total_bytes: int
    free_bytes: int
    group_bytes: int


@dataclass(frozen=True, slots=True)
class Joining:
    """The rank has met the others and begins the first exchange with them. No reply yet."""

    rank: int


@dataclass(frozen=True, slots=True)
class Alive:
    """The process runs, in a request. ``count`` of exchanges with other ranks. No reply yet."""

    request: int
    count: int


@dataclass(frozen=True, slots=True)
class Loading:
    """A load is under way; ``done`` is the part of it that is done, 0 to 1. No reply yet."""

    request: int
    done: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are in place. ``fingerprint`` is compared with the host's own model.

    It is empty where no look at the weights was asked for.
    ``is_new`` says that the file was read, ``models`` are all that this rank holds now, and
    ``digests`` name the weights in use, if they were asked for, and ``bytes_held`` is their size on
    this rank. ``attributes`` are the plain ones of its modules (``plain_attributes.py``), from rank
    0 of a model that is new.
    """

    request: int
    fingerprint: str
    seconds: float
    is_new: bool
    models: list[int]
    digests: dict[str, str]
    bytes_held: int
    attributes: dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """This rank could not load the model. It holds no weights and is well otherwise."""

    request: int
    error: str


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The memory is free."""

    request: int


@dataclass(frozen=True, slots=True)
class Done:
    """This rank's share of a call is computed.

    ``num_forwards`` counts this rank's calls since it started. ``dtype`` and ``shape`` describe
    the whole result; ``bytes_between_ranks`` is what this rank sent to other ranks in this call.
    ``is_finite`` says that neither NaN nor infinity is in what this rank has written of it.
    ``busy_seconds`` are those in which it did not wait for other ranks; with ``is_launch_bound``
    its CPU, and not its GPU, was busy in them. Both are of the request ``timed``: of this one on a
    CPU rank, of the one before on a GPU, and of none if that is 0. ``num_compiled`` blocks ran
    compiled, ``num_graphs`` were compiled meanwhile, and ``uncompiled`` is why blocks that were to
    run so did not. With ``is_replayed`` the call was one CUDA graph; with ``has_captured`` it was
    made one, for the calls to come; ``uncaptured`` is why neither, where it was to be.
    """

    request: int
    num_forwards: int
    dtype: FloatDtype
    shape: tuple[int, ...]
    seconds: float
    bytes_between_ranks: int
    bytes_written: int
    busy_seconds: float
    is_launch_bound: bool
    is_finite: bool
    num_compiled: int = 0
    num_graphs: int = 0
    uncompiled: str = ""
    is_replayed: bool = False
    has_captured: bool = False
    uncaptured: str = ""
    timed: int = 0


@dataclass(frozen=True, slots=True)
class Controlled:
    """This rank's tokens of a ControlNet's residuals are computed, and kept.

    ``layout`` says for each of ComfyUI's lists which residual a block takes. ``dtype`` and
    ``shape`` are those of one whole residual.
    """

    request: int
    layout: dict[str, list[int | None]]
    dtype: FloatDtype
    shape: tuple[int, ...]
    seconds: float
    bytes_between_ranks: int


@dataclass(frozen=True, slots=True)
class Ran:
    """This rank's share of a block is computed, and kept. Fields as in ``Done``."""

    request: int
    num_forwards: int
    seconds: float
    bytes_between_ranks: int
    busy_seconds: float


@dataclass(frozen=True, slots=True)
class Fetched:
    """The tokens are in the slot. Bytes are those that this rank sent to others."""

    request: int
    bytes_between_ranks: int


@dataclass(frozen=True, slots=True)
class Declined:
    """A node's patch cannot run here. Every rank says so, at the same place, and is well."""

    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class NoRoom:
    """A rank's device has no room for a call, which no rank has begun. Every rank says so."""

    request: int
    is_mine: bool


@dataclass(frozen=True, slots=True)
class Raised:
    """The call raised an exception here, and this rank is well. Other ranks speak for themselves.

    ``error`` is its class, ``num_exchanges`` those that this rank has made in the call: ranks that
    raised at the same place have made as many.
    """

    request: int
    error: str
    text: str
    num_exchanges: int


@dataclass(frozen=True, slots=True)
class Failed:
    """This rank could not do what it was asked. The worker may still be alive."""

    request: int
    phase: str
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Reached:
    """Names that the code of a model's blocks reaches, and what is reached around them alone.

    By container and name: a description (``describing.py``). ``kernels`` are torch's operators that
    Python code has replaced here, ``modes`` what is active here around all of torch's functions.
    """

    request: int
    in_blocks: dict[str, dict[str, str]]
    around: dict[str, dict[str, str]]
    kernels: list[str]
    modes: list[str]


Reply: TypeAlias = (
    Loaded
    | NotLoaded
    | Unloaded
    | Done
    | Controlled
    | Ran
    | Fetched
    | Declined
    | NoRoom
    | Raised
    | Reached
    | Failed
)
FromWorker: TypeAlias = Joining | Joined | Alive | Loading | Reply
