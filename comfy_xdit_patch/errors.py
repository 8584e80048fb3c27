"""The exceptions we raise on purpose, and ``Refusal``, which is not one.

Runs in: host and worker.

A refusal is a polite no with a reason: ComfyUI runs that step alone, exactly as it would without
us. An exception is a fault, ours or the user's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from http import HTTPStatus


class XditError(Exception):
    """Root of everything this package raises on purpose."""


class SettingsError(XditError):
    """A variable has a value that is not legal; the text names variable, value, legal values."""


class HttpError(XditError):
    """A request over HTTP that is not answered as asked; ``status`` is of the answer."""

    def __init__(self, text: str, status: HTTPStatus = HTTPStatus.FORBIDDEN) -> None:
        super().__init__(text)
        self.status = status


class PlanError(XditError):
    """Numbers that cannot be shared among ranks as asked."""


class ChannelClosedError(XditError):
    """The other process ended, or closed its side of the channel."""


class DeadlineExceededError(XditError):
    """A wait took longer than its deadline."""


class MessageError(XditError):
    """Bytes on the channel that are not one of our messages."""


class WorkerError(XditError):
    """A worker failed or died. The text names rank, phase and cause, and quotes its log."""


class ExchangeError(WorkerError):
    """The workers have met and cannot exchange data: it fails, hangs, or brings other data."""


class DeclinedError(XditError):
    """The workers are well, and cannot run a node's patch."""


class CardsFullError(XditError):
    """The workers are well, and a card has no room for a call."""


class CallRaisedError(XditError):
    """The workers are well, and a call raised the same exception, a ``kind``, in each of them."""

    def __init__(self, text: str, *, kind: str = "an exception") -> None:
        super().__init__(text)
        self.kind = kind


class AroundBlocksError(XditError):
    """The workers are well, and a node's code raised while they ran the blocks for it."""


class TheirError(XditError):
    """ComfyUI's or a node's own code raised ``error``, and nothing of ours has part in it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class FallBackError(XditError):
    """``XDIT_STRICT=1`` and a step could not run in parallel."""


class CheckError(XditError):
    """A part of ``comfy-xdit check`` cannot go on; the text says why."""


class Scope(enum.Enum):
    """How long a refusal lasts."""

    STEP = "step"
    """This call only; the next call of the same run may be parallel."""

    RUN = "run"
    """The rest of this sampling run, so that a GPU's memory does not change owner in every step."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a step runs on one GPU in ComfyUI's own process.

    The reason is a sentence without figures that change from step to step: each distinct reason
    is logged once and counted.
    """

    reason: str
    scope: Scope = Scope.RUN
    is_around_blocks: bool = False
    """The blocks are ComfyUI's own: the workers can run them while the rest runs here."""
    has_raised: bool = False
    """The call raised: ComfyUI may do so too, and then its exception is all that is said."""
    error: str | None = field(default=None, compare=False)
    """What happened this time, with its figures."""
