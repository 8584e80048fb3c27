"""DeepSpeed-Ulysses with unequal shares: tokens for heads, and back.

Runs in: worker process.

Dimension letters in this file
    B  batch
    S  sequence: all tokens of these ranks, in rank order: [text 0, image 0, text 1, ...]
    L  local sequence, this rank's shard of S
    H  heads
    G  local heads, those that this rank computes attention for
    K  head width
    R  ranks that exchange
    T  tensors that are exchanged together
    D  features: heads times head width

One all-to-all turns (all heads, my tokens) into (my heads, all tokens), and a second one turns what
attention makes of it back. Both have unequal splits, so no length and no head count has to divide
anything, and nothing is padded. Every rank knows all sizes from the plan; none is communicated.

Each tensor is copied once on each way, in one call where all ranks have as many heads: what is
launched does not grow with the ranks then. Unequal heads take a call for each rank.

The heads of every rank can be exchanged in parts. Heads do not depend on each other, so attention
runs on one part while another one is on its way, there or back.

Where the user wants it, values travel in 8 bits (``transfer_dtypes.py``), both ways, and scales
with them. A rank's own part is no exception: that would take one more kernel, and what arrives
would depend on who had it.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.sequence_shares import bounds, shard_sizes
from comfy_xdit_patch.planning.transfers import (
    TransferDtype,
    transfer_bytes,
    values_per_scale,
)
from comfy_xdit_patch.worker.attention.transfer_dtypes import dequantised, quantised
from comfy_xdit_patch.worker.ranks import collectives


def nothing() -> None:
    """Compute nothing while tokens are on their way."""


class HeadExchange:
    """One rank's part in the exchanges. ``bytes_sent`` counts what it sent to the others."""

    def __init__(
        self,
        *,
        heads: tuple[int, ...],
        index: int,
        group: dist.ProcessGroup | None,
        part: tuple[int, int] = (0, 1),
        dtype: TransferDtype = "exact",
    ) -> None:
        """Prepare.

        Args:
            heads: how many heads each rank of the group takes.
            group: the ranks that exchange; None where this rank is alone and exchanges nothing.
            part: which of how many parts of every rank's heads this exchanges.
            dtype: in which form values travel.
        """
        number, num_parts = part
        own = [bounds(shard_sizes(n, num_parts))[number] for n in heads]
        self._heads = tuple(end - start for start, end in own)
        self._head_bounds = [
            (first + start, first + end)
            for (first, _), (start, end) in zip(bounds(heads), own, strict=True)
        ]
        self._index = index
        self._group = group
        self.local_heads = self._heads[index]
        self._are_heads_even = len({*heads}) == 1
        self._is_part = num_parts > 1
        self._dtype: TransferDtype = dtype
        self.bytes_sent = 0

    def tokens_for_heads(
        self,
        *qkv_BHLK: torch.Tensor,
        tokens: tuple[int, ...],
        meanwhile: Callable[[], None] = nothing,
    ) -> tuple[torch.Tensor, ...]:
        """Exchange (B, H, L, K) for (B, G, S, K), all of them in one all-to-all.

        Args:
            meanwhile: called once they are on their way; what it computes hides the transfer.
        """
        arrived = self.send_tokens(*qkv_BHLK, tokens=tokens)
        meanwhile()
        return arrived()

    def send_tokens(
        self, *qkv_BHLK: torch.Tensor, tokens: tuple[int, ...]
    ) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Begin to exchange (B, H, L, K) for (B, G, S, K); what is returned waits for these."""
        if self._group is None:
            return lambda: qkv_BHLK
        batch, _, length, width = qkv_BHLK[0].shape
        row = len(qkv_BHLK) * batch * width
        sent = [length * row * heads for heads in self._heads]
        wire = qkv_BHLK[0].new_empty(sum(sent))
        if self._are_heads_even:
            ranks = len(self._heads)
            each = [t.view(batch, ranks, -1, length, width) for t in qkv_BHLK]
            if self._is_part:
                each = [t.narrow(2, self._head_bounds[0][0], self.local_heads) for t in each]
            # Each view is a call: here three tensors have one, and their place on the wire another.
            wire_RLTBGK = ranks, length, len(qkv_BHLK), batch, self.local_heads, width
            torch.stack(each, out=_permuted(wire, wire_RLTBGK, (2, 3, 0, 4, 1, 5)))
        else:
            # Each head range of q, k and v is copied once, straight to its place on the wire.
            for (start, end), part in zip(self._head_bounds, torch.split(wire, sent), strict=True):
                torch.stack(
                    [t[:, start:end].permute(2, 0, 1, 3) for t in qkv_BHLK],
                    dim=1,
                    out=part.view(length, len(qkv_BHLK), batch, end - start, width),
                )
        received = [n * row * self.local_heads for n in tokens]
        arrived = self._all_to_all(wire, self._group, width, sent=sent, received=received)

        def whole() -> tuple[torch.Tensor, ...]:
            # Shards follow each other along S, so what arrives is whole already, in rank order.
            whole_STBGK = sum(tokens), len(qkv_BHLK), batch, self.local_heads, width
            return _permuted(arrived(), whole_STBGK, (1, 2, 3, 0, 4)).unbind(0)

        return whole

    def heads_for_tokens(
        self, out_BSD: torch.Tensor, width: int, *, tokens: tuple[int, ...]
    ) -> torch.Tensor:
        """Exchange (B, S, G * K) for (B, L, H * K)."""
        if self._group is None:
            return out_BSD
        return together([self.send_heads(out_BSD, width, tokens=tokens)])

    def send_heads(
        self, out_BSD: torch.Tensor, width: int, *, tokens: tuple[int, ...]
    ) -> Callable[[], list[torch.Tensor]]:
        """Begin to exchange (B, S, G * K) for (B, L, H * K); what is returned waits for these.

        Returns:
            The shards that arrive: (B, L, R, G * K) of all ranks, or (B, L, G * K) of each rank
            where their heads differ.
        """
        assert self._group is not None, "a rank alone exchanges nothing"
        batch, local_tokens = out_BSD.shape[0], tokens[self._index]
        sizes = [local_tokens * batch * heads * width for heads in self._heads]
        out_SBD = out_BSD if batch == 1 else out_BSD.transpose(0, 1)
        arrived = self._all_to_all(
            out_SBD.reshape(-1),
            self._group,
            width,
            sent=[n * batch * out_BSD.shape[2] for n in tokens],
            received=sizes,
        )

        def shards() -> list[torch.Tensor]:
            if self._are_heads_even:
                shards_RLBD = len(sizes), local_tokens, batch, self.local_heads * width
                return [_permuted(arrived(), shards_RLBD, (2, 1, 0, 3))]
            return [
                shard.view(local_tokens, batch, -1).transpose(0, 1)
                for shard in torch.split(arrived(), sizes)
            ]

        return shards

    def _all_to_all(
        self,
        data: torch.Tensor,
        group: dist.ProcessGroup,
        width: int,
        *,
        sent: Sequence[int],
        received: Sequence[int],
    ) -> Callable[[], torch.Tensor]:
        """Begin to send; what is returned waits, and keeps what is sent until then."""
        dtype, of, together = self._dtype, data.dtype, values_per_scale(width)
        if dtype != "exact":
            in_bytes = partial(
                transfer_bytes, dtype=dtype, head_width=width, value_bytes=of.itemsize
            )
            sent, received = ([in_bytes(n) for n in sizes] for sizes in (sent, received))
            data = quantised(data, dtype, together)
        out = data.new_empty(sum(received))
        work = collectives.all_to_all_async(out, data, received=received, sent=sent, group=group)
        self.bytes_sent += (sum(sent) - sent[self._index]) * data.element_size()
        under_way = [(work, data)]

        def arrived() -> torch.Tensor:
            collectives.finish([under_way.pop()[0]])
            return out if dtype == "exact" else dequantised(out, dtype, together, of)

        return arrived


def together(parts: Sequence[Callable[[], list[torch.Tensor]]]) -> torch.Tensor:
    """Return (B, L, H * K), once all parts of the heads have arrived (``send_heads``)."""
    arrived = [part() for part in parts]
    if arrived[0][0].ndim == 4:
        whole = [shards_BLRD for [shards_BLRD] in arrived]
        joined = whole[0] if len(whole) == 1 else torch.cat(whole, dim=3)
        return joined.reshape(*joined.shape[:2], -1)
    # Of each rank all of its heads, and of these one part after the other.
    ranks = zip(*arrived, strict=True)
    return torch.cat([part for rank in ranks for part in rank if part.numel()], dim=2)


def _permuted(flat: torch.Tensor, shape: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """View flat memory in a shape with its dimensions in another order: two views in one call."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return flat.as_strided([shape[dim] for dim in order], [strides[dim] for dim in order])
