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

Each tensor is copied once on each way, by one kernel where all ranks have as many heads: what is
launched does not grow with the ranks then. Unequal heads take a kernel for each rank.

Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.sequence_shares import bounds
from comfy_xdit_patch.worker.ranks import collectives


def nothing() -> None:
    """Compute nothing while tokens are on their way."""


class HeadExchange:
    """One rank's part in the exchanges. ``bytes_sent`` counts what it sent to the others."""

    def __init__(
        self, *, heads: tuple[int, ...], index: int, group: dist.ProcessGroup | None
    ) -> None:
        """Prepare.

        Args:
            heads: how many heads each rank of the group takes.
            group: the ranks that exchange; None where this rank is alone and exchanges nothing.
        """
        self._heads = heads
        self._head_bounds = bounds(heads)
        self._index = index
        self._group = group
        self.local_heads = heads[index]
        self._are_heads_even = len({*heads}) == 1
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
        if self._group is None:
            meanwhile()
            return qkv_BHLK
        batch, _, length, width = qkv_BHLK[0].shape
        row = len(qkv_BHLK) * batch * width
        sent = [length * row * heads for heads in self._heads]
        wire = qkv_BHLK[0].new_empty(sum(sent))
        if self._are_heads_even:
            ranks = len(self._heads)
            torch.stack(
                [t.view(batch, ranks, -1, length, width).permute(1, 3, 0, 2, 4) for t in qkv_BHLK],
                dim=2,
                out=wire.view(ranks, length, len(qkv_BHLK), batch, self.local_heads, width),
            )
        else:
            # Each head range of q, k and v is copied once, straight to its place on the wire.
            for (start, end), part in zip(self._head_bounds, torch.split(wire, sent), strict=True):
                torch.stack(
                    [t[:, start:end].permute(2, 0, 1, 3) for t in qkv_BHLK],
                    dim=1,
                    out=part.view(length, len(qkv_BHLK), batch, end - start, width),
                )
        received = self._all_to_all(
            wire,
            self._group,
            sent=sent,
            received=[n * row * self.local_heads for n in tokens],
            meanwhile=meanwhile,
        )
        del wire
        # Shards follow each other along S, so what arrives is whole already, in rank order.
        whole_STBGK = received.view(sum(tokens), len(qkv_BHLK), batch, self.local_heads, width)
        return whole_STBGK.permute(1, 2, 3, 0, 4).unbind(0)

    def heads_for_tokens(
        self, out_BSD: torch.Tensor, width: int, *, tokens: tuple[int, ...]
    ) -> torch.Tensor:
        """Exchange (B, S, G * K) for (B, L, H * K)."""
        if self._group is None:
            return out_BSD
        batch, local_tokens = out_BSD.shape[0], tokens[self._index]
        sizes = [local_tokens * batch * heads * width for heads in self._heads]
        received = self._all_to_all(
            out_BSD.transpose(0, 1).reshape(-1),
            self._group,
            sent=[n * batch * out_BSD.shape[2] for n in tokens],
            received=sizes,
        )
        if self._are_heads_even:
            shards_RLBD = received.view(len(self._heads), local_tokens, batch, -1)
            return shards_RLBD.permute(2, 1, 0, 3).reshape(batch, local_tokens, -1)
        parts = torch.split(received, sizes)
        return torch.cat(
            [part.view(local_tokens, batch, -1) for part in parts if part.numel()], dim=2
        ).transpose(0, 1)

    def _all_to_all(
        self,
        data: torch.Tensor,
        group: dist.ProcessGroup,
        *,
        sent: Sequence[int],
        received: Sequence[int],
        meanwhile: Callable[[], None] = nothing,
    ) -> torch.Tensor:
        out = data.new_empty(sum(received))
        work = collectives.all_to_all_async(out, data, received=received, sent=sent, group=group)
        meanwhile()
        collectives.finish([work])
        self.bytes_sent += (sum(sent) - sent[self._index]) * data.element_size()
        return out
