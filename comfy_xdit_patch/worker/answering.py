"""Answer an exception that all ranks raise alike, so that nobody is lost by it.

Runs in: worker process.

A model that is given tensors of the wrong size raises in every rank at the same place, as it does
in ComfyUI alone. Such a rank is well: it waits for no other rank, and none waits for it. The host
sees whether the other ranks raised too: it has the answers of all ranks, or it ends all of them
(``host/pool/exchange.py``).
"""

from __future__ import annotations

import logging

import torch

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.messages.replies import Raised
from comfy_xdit_patch.wire.messages.requests import Control, Decode, Fetch, Forward, RunBlock
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.worker.weights.residents import Residents

NEVER_ALIKE = (torch.OutOfMemoryError, MemoryError, ChannelClosedError, DeadlineExceededError)
"""Errors of one rank's own device, memory or channel: where the other ranks are is not known."""

log = logging.getLogger(__name__)


def answer(
    error: Exception,
    message: Forward | Control | RunBlock | Fetch | Decode,
    *,
    num_exchanges: int,
    residents: Residents,
    groups: Groups,
) -> Raised:
    """Return what a rank that raised an exception says to the host.

    Args:
        num_exchanges: how many exchanges this rank had begun in the call.

    Raises:
        Exception: ``error`` itself, where this rank cannot know that it is well.
    """
    # What one stage has sent lies there until another one takes it, in a later call.
    has_stages = (
        not isinstance(message, Decode)
        and ParallelPlan.of_grid(message.grid, message.weights).pipefusion > 1
    )
    if isinstance(error, NEVER_ALIKE) or (has_stages and num_exchanges > 0):
        raise error
    residents.settle()
    if collectives.is_in_one():
        raise error
    if groups.device.type == "cuda":
        torch.cuda.synchronize()  # An error of a kernel comes out here.
    log.warning("the call raised an exception, and this rank goes on", exc_info=error)
    return Raised(message.request, type(error).__name__, str(error), num_exchanges)
