"""Whether the replies of all ranks can be the answer to a request.

Runs in: host process. No torch.

A worker is not believed: its memory may be corrupt, or another version's code on its path. What
it says is used as a size, an index or a name of torch's, so it is held against the request first.
What is wrong is a ``MessageError``, which loses the workers and costs no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.messages.replies import (
    Controlled,
    Declined,
    Done,
    Fetched,
    Loaded,
    NoRoom,
    NotLoaded,
    Raised,
    Ran,
    Reached,
    Reply,
    Unloaded,
)
from comfy_xdit_patch.wire.messages.requests import (
    Control,
    Fetch,
    Forward,
    Free,
    GiveWay,
    Load,
    Reach,
    RunBlock,
    Unload,
)

ANSWERS: dict[type[Any], tuple[type[Any], ...]] = {
    Load: (Loaded, NotLoaded),
    Unload: (Unloaded,),
    GiveWay: (Unloaded,),
    Forward: (Done, Declined, Raised),
    Control: (Controlled, Raised),
    RunBlock: (Ran, Declined, Raised),
    Fetch: (Fetched, Raised),
    Free: (Unloaded,),
    Reach: (Reached,),
}
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_BLOCKS = 1000
"""No model has so many blocks; a list of residuals has an item for each block."""
RESIDUAL_LISTS = ("input", "middle", "output")
"""ComfyUI's names."""


def check_answers(request: Message, replies: Sequence[Reply]) -> None:
    """See whether replies, in rank order, can be those to a request.

    Raises:
        MessageError: one cannot.
    """
    kinds = {type(reply) for reply in replies}
    allowed = ANSWERS[type(request)]
    if getattr(request, "working_bytes", 0):
        allowed = (*allowed, NoRoom)
    for rank, reply in enumerate(replies):
        # Ranks compute together, so they say the same; a load is each rank's own.
        if type(reply) not in allowed or (len(kinds) > 1 and kinds & {Declined, NoRoom, Raised}):
            raise MessageError(
                f"Rank {rank} answered {type(request).__name__} with {type(reply).__name__}."
            )
    first = replies[0]
    for rank, reply in enumerate(replies):
        if isinstance(reply, (Done, Controlled)):
            assert isinstance(first, (Done, Controlled))
            _check_result(rank, reply)
            if (reply.dtype, reply.shape) != (first.dtype, first.shape):
                raise MessageError(
                    f"Rank {rank} has a result of {reply.dtype}{list(reply.shape)}, "
                    f"rank 0 of {first.dtype}{list(first.shape)}."
                )
        if isinstance(reply, Controlled):
            _check_layout(rank, reply.layout)


def check_shape(reply: Done | Controlled, shape: Sequence[int]) -> None:
    """See whether a result, which is the same on all ranks, has the shape that it must have.

    Raises:
        MessageError: it has another.
    """
    if reply.shape != tuple(shape):
        raise MessageError(
            f"The ranks have a result of shape {list(reply.shape)}; it must be {list(shape)}."
        )


def _check_result(rank: int, reply: Done | Controlled) -> None:
    num_bytes = 8
    for size in reply.shape:
        num_bytes *= size
    if reply.dtype not in FLOAT_DTYPES or min(reply.shape, default=1) < 1 or num_bytes >= 1 << 63:
        raise MessageError(
            f"Rank {rank} has a result of {reply.dtype[:40]}{list(reply.shape[:8])}, which is none."
        )


def _check_layout(rank: int, layout: dict[str, list[int | None]]) -> None:
    """Residuals are numbered from 0, and each has a place."""
    places = sorted({item for part in layout.values() for item in part if item is not None})
    is_well = all(
        name in RESIDUAL_LISTS and len(part) <= MAX_BLOCKS for name, part in layout.items()
    )
    if not is_well or not places or places != list(range(len(places))):
        raise MessageError(f"Rank {rank} has residuals that are not numbered from 0.")
