"""Attention over a sharded sequence: DeepSpeed-Ulysses with unequal shares.

Runs in: worker process.

Dimension letters in this file
    B  batch
    S  sequence, all tokens of it, in rank order: [text 0, image 0, text 1, ...]
    L  local sequence, this rank's shard of S
    H  heads
    G  local heads, those that this rank computes attention for
    K  head width

One all-to-all turns (all heads, my tokens) into (my heads, all tokens), ComfyUI's own attention
function runs on that, and a second one turns the output back. Both have unequal splits, so no
length and no head count has to divide anything, and nothing is padded.

Attention does not care in which order keys come, so rank order is as good as any; a mask is put
into that order. RoPE is applied by ComfyUI before attention is called, with this rank's own
positions.

Source: DeepSpeed-Ulysses, arXiv:2309.14509. Unequal splits: every rank knows all sizes from the
plan, no size is ever communicated. (xfuser's ``USP`` demands equal lengths and heads that divide.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.engine import collectives
from comfy_xdit_patch.planning.plan import SequenceShares, bounds


class UlyssesAttention:
    """ComfyUI's ``optimized_attention_override`` for one call on one rank.

    ``bytes_sent`` counts what this rank sent to the others.
    """

    def __init__(
        self,
        *,
        shares: SequenceShares,
        index: int,
        group: dist.ProcessGroup,
        function: Callable[..., torch.Tensor] | None = None,
        wants_order: bool = False,
    ) -> None:
        """Prepare for a call.

        Args:
            shares: tokens and heads of every rank in the sequence group.
            index: this rank's place in the group.
            function: a node's own ``optimized_attention_override``, to run on the local heads.
            wants_order: give it the tokens in ComfyUI's order.
        """
        self._heads = shares.heads
        self._head_bounds = bounds(shares.heads)
        self._index = index
        self._group = group
        self._masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shares = shares
        self._function = function
        self._wants_order = wants_order
        self.bytes_sent = 0

    def __call__(
        self,
        attention: Callable[..., torch.Tensor],
        q_BHLK: torch.Tensor,
        k_BHLK: torch.Tensor,
        v_BHLK: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run ComfyUI's ``attention`` on this rank's heads over the whole sequence.

        Args:
            mask: of the whole sequence, in ComfyUI's own order of tokens.

        Shapes:
            q, k, v (B, H, L, K) -> output (B, L, H * K), as ``skip_reshape=True`` has it

        Collective:
            Every rank of the sequence group must call this, in the same order.
        """
        batch, _, _, head_width = q_BHLK.shape
        queries, keys = (self._lengths(t.shape[2]) for t in (q_BHLK, k_BHLK))
        if queries == keys:
            q, k, v = self._tokens_for_heads(q_BHLK, k_BHLK, v_BHLK, tokens=queries)
        else:
            (q,) = self._tokens_for_heads(q_BHLK, tokens=queries)
            k, v = self._tokens_for_heads(k_BHLK, v_BHLK, tokens=keys)
        local_heads = self._heads[self._index]
        if not local_heads:
            out = q.new_empty((batch, sum(queries), 0))
        elif self._wants_order and self._function is not None and queries == keys:
            order = self._order(q.device)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            ordered = (t.index_select(2, back) for t in (q, k, v))
            out = self._function(attention, *ordered, local_heads, mask=mask, **kwargs)
            out = out.index_select(1, order)
        else:
            mask = None if mask is None else self._in_rank_order(mask, heads)
            run = attention if self._function is None else partial(self._function, attention)
            out = run(q, k, v, local_heads, mask=mask, **kwargs)
        return self._heads_for_tokens(out, head_width, tokens=queries)

    def _lengths(self, local: int) -> tuple[int, ...]:
        """Tokens of every rank: all of them, or all but references whose keys are cached."""
        without = tuple(map(sum, zip(self._shares.text, self._shares.image, strict=True)))
        for tokens in (self._shares.joint, without):
            if tokens[self._index] == local:
                return tokens
        raise ValueError(f"{local} tokens are neither {self._shares.joint} nor {without}.")

    def _in_rank_order(self, mask: torch.Tensor, heads: int) -> torch.Tensor:
        """Put a mask's rows and columns in the order in which tokens arrive here.

        Shapes:
            ``mask`` (S, S), (B, S, S) or (B, H, S, S); any size may be 1 instead
        """
        known = self._masks.get(id(mask))
        if known is None:
            order = self._order(mask.device)
            sorted_mask = mask
            for dim in (-2, -1):
                if mask.shape[dim] == len(order):
                    sorted_mask = sorted_mask.index_select(dim, order)
            if mask.ndim == 4 and mask.shape[1] == heads:
                start, end = self._head_bounds[self._index]
                sorted_mask = sorted_mask[:, start:end]
            # The same for all blocks of a call; its object is kept so that its id is.
            known = self._masks[id(mask)] = mask, sorted_mask
        return known[1]

    def _order(self, device: torch.device) -> torch.Tensor:
        """Where each token that arrives here stands in ComfyUI's order."""
        return torch.tensor(
            [
                token
                for rank in range(len(self._heads))
                for start, end in self._shares.places(rank)
                for token in range(start, end)
            ],
            device=device,
        )

    def _tokens_for_heads(
        self, *qkv_BHLK: torch.Tensor, tokens: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Exchange (B, H, L, K) for (B, G, S, K), all of them in one all-to-all."""
        batch, _, length, width = qkv_BHLK[0].shape
        row = len(qkv_BHLK) * batch * width
        sent = [length * row * heads for heads in self._heads]
        wire = qkv_BHLK[0].new_empty(sum(sent))
        # Each head range of q, k and v is copied once, straight to its place on the wire.
        for (start, end), chunk in zip(self._head_bounds, torch.split(wire, sent), strict=True):
            torch.stack(
                [t[:, start:end].permute(2, 0, 1, 3) for t in qkv_BHLK],
                dim=1,
                out=chunk.view(length, len(qkv_BHLK), batch, end - start, width),
            )
        received = self._all_to_all(
            wire,
            sent=sent,
            received=[n * row * self._heads[self._index] for n in tokens],
        )
        del wire, chunk
        # Shards follow each other along S, so what arrives is whole already, in rank order.
        whole_STBGK = received.view(
            sum(tokens), len(qkv_BHLK), batch, self._heads[self._index], width
        )
        return tuple(t_SBGK.permute(1, 2, 0, 3) for t_SBGK in whole_STBGK.unbind(1))

    def _heads_for_tokens(
        self, out_BSD: torch.Tensor, width: int, *, tokens: tuple[int, ...]
    ) -> torch.Tensor:
        """Exchange (B, S, G * K) for (B, L, H * K)."""
        batch = out_BSD.shape[0]
        local_tokens = tokens[self._index]
        received = self._all_to_all(
            out_BSD.transpose(0, 1).reshape(-1),
            sent=[n * batch * out_BSD.shape[2] for n in tokens],
            received=[local_tokens * batch * heads * width for heads in self._heads],
        )
        sizes = [local_tokens * batch * heads * width for heads in self._heads]
        parts = torch.split(received, sizes)
        return torch.cat(
            [part.view(local_tokens, batch, -1) for part in parts if part.numel()], dim=2
        ).transpose(0, 1)

    def _all_to_all(
        self, data: torch.Tensor, *, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        out = data.new_empty(sum(received))
        collectives.all_to_all(out, data, received=received, sent=sent, group=self._group)
        self.bytes_sent += (sum(sent) - sent[self._index]) * data.element_size()
        return out
