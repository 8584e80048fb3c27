"""What became of one call of a FLUX model: its result, or why there is none.

Runs in: host process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from comfy_xdit_patch.errors import (
    AroundBlocksError,
    CallRaisedError,
    CardsFullError,
    DeclinedError,
    PlanError,
    Refusal,
    Scope,
    WorkerError,
)
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.auto import Kind
from comfy_xdit_patch.patching.holding import LOST
from comfy_xdit_patch.transport.slots import UncarriedArgumentError


@dataclass(frozen=True, slots=True)
class Step:
    """A call that is computed.

    ``gathered_for`` is why a part of it ran here; ``is_empty`` says that no block ran on the
    workers: a node left them out, or computed them itself. ``is_one``: it ran here, to be timed.
    """

    out: torch.Tensor
    gathered_for: str | None = None
    is_empty: bool = False
    is_one: bool = False
    kind: Kind | None = None
    """Set if the time of the step tells ``auto`` something."""


def checked(step: Step) -> Step | Refusal:
    """Refuse a result that is no image. Whether ComfyUI's own is one, ComfyUI finds out."""
    # A sum is quicker, and says the same unless half precision overflows in it.
    if not step.out.sum().isfinite() and not step.out.isfinite().all():
        return Refusal("the workers' result has NaN or infinity in it")
    return step


def lost(error: WorkerError, totals: Totals) -> Refusal:
    """Note a loss of the workers, and return it as the reason why ComfyUI computes a call."""
    totals.last_error = str(error)
    totals.last_loss_unix_s = time.time()
    return LOST


def refusal_of(error: Exception, totals: Totals) -> Refusal | None:
    """Why ComfyUI computes a call in which this was raised; None for what is a fault of ours."""
    if isinstance(error, WorkerError):
        return lost(error, totals)
    if isinstance(error, CallRaisedError):
        totals.last_error = str(error)
        return Refusal(f"the call raised {error.kind} on the workers", has_raised=True)
    if isinstance(error, AroundBlocksError):
        totals.last_error = str(error)
        return Refusal("a node's code failed while its blocks ran on the workers", has_raised=True)
    if isinstance(error, DeclinedError):
        return Refusal(f"a node's patch cannot run on the workers: {error}")
    if isinstance(error, CardsFullError):
        return Refusal("the cards have no room for this call beside the weights")
    if isinstance(error, PlanError):
        return Refusal("a node left a rank without tokens", Scope.STEP)
    if isinstance(error, UncarriedArgumentError):
        return Refusal(f"an argument cannot be carried over: {error}", Scope.STEP)
    return None
