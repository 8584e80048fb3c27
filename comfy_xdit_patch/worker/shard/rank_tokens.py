"""What belongs to the tokens of a call: cut to those of one rank, and gathered from all.

Runs in: worker process.

Whole tokens are in ComfyUI's own order. Tokens are gathered for code that was not written for
shards: every rank gives it whole tensors, and it does the same on every rank.

Dimension letters in this file
    B  batch
    S  sequence, all tokens of it
    L  local sequence, this rank's shard of S
    N  ranks
    D  features of a token

Shards may differ by a token, and are never padded for attention. A 1024 px image is 4096 tokens;
three GPUs get 1366, 1365 and 1365. A padded token would be a real key: with no mask, softmax gives
it weight and every row of the output moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from comfy_xdit_patch.planning.sequence_shares import SEQUENCE_DIM, SequenceShares
from comfy_xdit_patch.worker.attention.masks import order_of
from comfy_xdit_patch.worker.ranks import collectives

STREAMS = {"text": (0,), "image": (1, 2), "joint": (0, 1, 2)}
"""Which kinds of tokens (text, image, reference) make up a stream."""


class RankTokens:
    """One rank's place among the tokens of a call."""

    def __init__(self, shares: SequenceShares, index: int, group: dist.ProcessGroup | None) -> None:
        """Take a place.

        Args:
            group: the ranks that hold the shares; None where nothing is gathered.
        """
        self.shares = shares
        self._index = index
        self._group = group
        self.bytes_sent = 0
        """What this rank sent to others in gathers."""

    @property
    def num_tokens(self) -> int:
        return sum(self.shares.joint)

    @property
    def num_text_tokens(self) -> int:
        return sum(self.shares.text)

    @property
    def num_own_references(self) -> int:
        return self.shares.reference[self._index]

    def gather(
        self, own: torch.Tensor, stream: str = "joint", *, dim: int = SEQUENCE_DIM
    ) -> torch.Tensor:
        """Return the tokens of all ranks in ComfyUI's order.

        Collective:
            Every rank of the sequence group calls this in the same order.
        """
        assert self._group is not None
        places = [self._places(stream, rank) for rank in range(len(self.shares.text))]
        sizes = tuple(sum(end - start for start, end in of_rank) for of_rank in places)
        first_dims = own.transpose(SEQUENCE_DIM, dim)
        flat = first_dims.flatten(2) if first_dims.ndim > 2 else first_dims.unsqueeze(2)
        joined = gather_sequence(flat, sizes=sizes, group=self._group)
        self.bytes_sent += max(sizes) * (flat.nbytes // max(flat.shape[1], 1)) * (len(sizes) - 1)
        order = order_of(tuple(place for of_rank in places for place in of_rank), own.device)
        whole = torch.empty_like(joined).index_copy_(SEQUENCE_DIM, order, joined)
        shape = (whole.shape[0], whole.shape[1], *first_dims.shape[2:])
        return whole.view(shape).transpose(SEQUENCE_DIM, dim)

    def own(
        self, whole: torch.Tensor, stream: str = "joint", *, dim: int = SEQUENCE_DIM
    ) -> torch.Tensor:
        """Return this rank's part of whole tokens, in a tensor of its own.

        Where ``whole`` has fewer tokens than the sequence, they are its first ones: a ControlNet's
        residuals do not cover references.
        """
        length = whole.shape[dim]
        parts = [
            whole.narrow(dim, min(start, length), min(end, length) - min(start, length))
            for start, end in self._places(stream, self._index)
        ]
        return torch.cat(parts, dim)

    def ranges(self, ranges: Sequence[Sequence[int]], stream: str) -> list[tuple[int, ...]]:
        """Cut ranges (start, end, more...) of a stream, as this rank numbers its own part."""
        found = []
        for first, last, *more in ranges:
            before = 0
            for start, end in self._places(stream, self._index):
                low, high = max(first, start), min(last, end)
                if low < high:
                    found.append((before + low - start, before + high - start, *more))
                before += end - start
        return found

    def _places(self, stream: str, rank: int) -> list[tuple[int, int]]:
        places = self.shares.places(rank)
        offset = sum(self.shares.text) if stream == "image" else 0
        return [(places[kind][0] - offset, places[kind][1] - offset) for kind in STREAMS[stream]]


def rows_of(value: Any, first: int, end: int) -> Any:
    """Take rows of the batch from every tensor of an argument."""
    if isinstance(value, torch.Tensor):
        return value[first:end]
    if isinstance(value, list):
        return [rows_of(item, first, end) for item in value]
    if isinstance(value, dict):
        return {key: rows_of(item, first, end) for key, item in value.items()}
    return value


def gather_sequence(
    x_BLD: torch.Tensor, *, sizes: tuple[int, ...], group: dist.ProcessGroup
) -> torch.Tensor:
    """Join the shards of all ranks, in rank order.

    Args:
        sizes: length of each rank's shard. Passed in, not communicated: each rank already knows
            it from the plan, and a size exchange would cost a second collective.

    Shapes:
        ``x_BLD`` (B, L, D) -> (B, S, D)

    Collective:
        Every rank of ``group`` must call this, in the same order.
    """
    missing = max(sizes) - x_BLD.shape[SEQUENCE_DIM]
    # Padding for the wire only. Gloo refuses unequal sizes and NCCL turns them into one
    # broadcast per rank (pytorch/pytorch#156627, NVIDIA/nccl#773).
    wire_BLD = (F.pad(x_BLD, (0, 0, 0, missing)) if missing else x_BLD).contiguous()
    num_ranks, shape = len(sizes), wire_BLD.shape
    arrived = wire_BLD.new_empty((num_ranks * shape[0], *shape[1:]))
    collectives.all_gather_into(arrived, wire_BLD, group=group)
    shards_NBLD = arrived.view(num_ranks, *shape)
    if min(sizes) == max(sizes):
        return shards_NBLD.transpose(0, 1).flatten(1, 2)  # for one row a view
    trimmed = [
        shard.narrow(SEQUENCE_DIM, 0, size)
        for shard, size in zip(shards_NBLD.unbind(), sizes, strict=True)
    ]
    return torch.cat(trimmed, dim=SEQUENCE_DIM)
