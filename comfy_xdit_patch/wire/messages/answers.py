"""Whether the replies of all ranks can be the answer to a request.

Runs in: host process. No torch.

Types, and names of dtypes, are the codec's to check. Here a reply is held against its request, and
what it says of a result's shape, which the host makes tensors by. What is wrong is a
``MessageError``, which loses the workers and costs no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
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
    Decode,
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
    Decode: (Done, Declined, Raised),
    Free: (Unloaded,),
    Reach: (Reached,),
}
VALUE_BYTES = 8
"""Of the widest dtype."""


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
    num_bytes = VALUE_BYTES * prod(reply.shape)
    if min(reply.shape, default=1) < 1 or num_bytes >= 1 << 63:
        raise MessageError(
            f"Rank {rank} has a result of {reply.dtype}{list(reply.shape[:8])}, which is none."
        )
