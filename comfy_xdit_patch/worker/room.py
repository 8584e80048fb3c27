"""See that every rank has room for a call before any of them begins it.

Runs in: worker process.

A rank that runs out of memory in the middle of a call leaves the other ranks inside an exchange,
and all are lost. Before the first exchange every rank can still say so and be well.
"""

from __future__ import annotations

import torch

from comfy_xdit_patch.wire.messages.replies import NoRoom
from comfy_xdit_patch.wire.messages.requests import Control, Decode, Forward, RunBlock
from comfy_xdit_patch.worker.ranks import collectives


def has_room(device: torch.device, num_bytes: int) -> bool:
    """Whether a device has so much memory left, also by giving back what is kept for later."""
    for _ in range(2):
        try:
            torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        else:
            return True
    return False


def no_room_for(
    message: Forward | Control | RunBlock | Decode, device: torch.device
) -> NoRoom | None:
    """Look whether every rank has room for a call, if the host asks for that.

    Collective:
        Every rank of the world, for the same message.
    """
    if not message.working_bytes:
        return None
    is_short = not has_room(device, message.working_bytes)
    flag = torch.tensor(float(is_short)).to(device)
    collectives.all_reduce_max(flag)
    return NoRoom(message.request, is_short) if flag.item() else None
