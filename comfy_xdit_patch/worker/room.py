"""See that every rank has room for a call before any of them begins it.

Runs in: worker process.

A rank that runs out of memory in the middle of a call leaves the other ranks inside an exchange,
and all are lost. Before the first exchange every rank can still say so and be well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from comfy_xdit_patch.wire.messages.replies import NoRoom
from comfy_xdit_patch.wire.messages.requests import Control, Decode, Forward, RunBlock
from comfy_xdit_patch.worker.ranks import collectives


def has_room(device: torch.device, num_bytes: int, give_back: Callable[[], None]) -> bool:
    """Whether a device has so much memory left, also by giving back what is kept for later.

    Args:
        give_back: gives back what of that torch does not know of.
    """
    for _ in range(2):
        try:
            torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            give_back()
            torch.cuda.empty_cache()
        else:
            return True
    return False


def no_room_for(
    message: Forward | Control | RunBlock | Decode,
    device: torch.device,
    give_back: Callable[[], None],
) -> NoRoom | None:
    """Look whether every rank has room for a call, if the host asks for that; see ``has_room``.

    Collective:
        Every rank of the world, for the same message.
    """
    if not message.working_bytes:
        return None
    is_short = not has_room(device, message.working_bytes, give_back)
    flag = torch.tensor(float(is_short)).to(device)
    collectives.all_reduce_max(flag)
    return NoRoom(message.request, is_short) if flag.item() else None
