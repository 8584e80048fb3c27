"""Attention over a sharded sequence: ulysses, a ring, or both (USP).

Runs in: worker process.

Dimension letters in this file
    B  batch
    L  local sequence, this rank's shard
    H  heads
    K  head width

Ranks that exchange tokens for heads (``ulysses.py``) then have all their tokens together, each rank
for some heads. Without a ring these are all tokens of the sequence, and ComfyUI's own attention
function runs on them. With a ring, the keys of the other ranks come round (``ring.py``); without
an all-to-all, each rank stands alone at its place of the ring.

Where it pays, tokens are exchanged for one half of the heads after the other: attention for the
first half runs while the second one is on its way, and its result travels while attention for the
second half runs. Heads do not depend on each other: the bits are the same.

Attention does not care in which order keys come, so rank order is as good as any; a mask is put
into that order. RoPE is applied by ComfyUI before attention is called, with this rank's own
positions.

Source: USP, arXiv:2405.07719. (xfuser's ``USP`` demands equal lengths and heads that divide.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from comfy_xdit_patch.planning.sequence_shares import SequenceShares
from comfy_xdit_patch.worker.attention.local_heads import LocalHeadsAttention
from comfy_xdit_patch.worker.attention.lse import Bias
from comfy_xdit_patch.worker.attention.masks import Span, inverse_of, order_of
from comfy_xdit_patch.worker.attention.ring import ring_attention
from comfy_xdit_patch.worker.attention.ulysses import HeadExchange, nothing, together
from comfy_xdit_patch.worker.ranks.groups import PlanGroups

RING_KNOWS = {"skip_reshape", "transformer_options", "_inside_attn_wrapper", "scale"}
"""Arguments of ComfyUI's attention functions."""


class SequenceAttention(LocalHeadsAttention):
    """ComfyUI's ``optimized_attention_override`` for one call on one rank."""

    def __init__(
        self,
        *,
        shares: SequenceShares,
        index: int,
        groups: PlanGroups,
        function: Callable[..., torch.Tensor] | None = None,
        wants_order: bool = False,
        meanwhile: Callable[[], None] = nothing,
        in_halves: bool = False,
    ) -> None:
        """Prepare for a call.

        Args:
            shares: tokens and heads of every rank in the sequence group.
            index: this rank's place in the group.
            function: a node's own ``optimized_attention_override``, to run on the local heads.
            wants_order: give ``function`` the tokens in ComfyUI's order.
            meanwhile: called once tokens are on their way, and before their exchange is over.
            in_halves: exchange one half of the heads after the other, in calls that allow for it.
        """
        if function is not None and groups.ring is not None:
            raise ValueError("A ring has no place for an attention function of a node's.")
        super().__init__(
            shares=shares,
            index=index,
            group=groups.ulysses,
            function=function,
            dtype=groups.transfer_dtype,
        )
        self._shares = shares
        self._index = index
        self._groups = groups
        self._place = index // shares.ulysses_degree
        self._wants_order = wants_order
        self._meanwhile = meanwhile
        self._ring_bytes = 0
        self._halves: list[HeadExchange] = []
        if in_halves and groups.ulysses is not None and groups.ring is None:
            self._halves = [
                HeadExchange(
                    heads=shares.heads,
                    index=index,
                    group=groups.ulysses,
                    part=(half, 2),
                    dtype=groups.transfer_dtype,
                )
                for half in range(2)
            ]

    def prescribed(self, function: Callable[..., torch.Tensor]) -> SequenceAttention:
        """Return an override that runs the checkpoint's attention, unless a node chose a function.

        The checkpoint's function gets the tokens in ComfyUI's order: it may look at their places.
        """
        other = super().prescribed(function)
        if other is not self:
            other._wants_order = True
        return other

    @property
    def bytes_sent(self) -> int:
        """What this rank sent to the others."""
        halves = sum(half.bytes_sent for half in self._halves)
        return super().bytes_sent + halves + self._ring_bytes

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
        """Run attention on this rank's heads over the whole sequence.

        Args:
            attention: ComfyUI's function. A ring runs torch's own kernels instead (``lse.py``).
            mask: of the whole sequence, in ComfyUI's own order of tokens.

        Shapes:
            q, k, v (B, H, L, K) -> output (B, L, H * K), as ``skip_reshape=True`` has it

        Collective:
            Every rank of the sequence group must call this, in the same order.
        """
        exchange = self._exchange
        queries, keys = (self._lengths(t.shape[2]) for t in (q_BHLK, k_BHLK))
        near = self._neighbours(self._place)
        tokens = queries[near.start : near.stop]
        meanwhile = self._meanwhile
        # A mask may have heads, and somebody's function may look at all that this rank has.
        if self._halves and mask is None and self._function is None and queries == keys:
            return self._in_halves(attention, q_BHLK, k_BHLK, v_BHLK, tokens, **kwargs)
        if queries == keys:
            q, k, v = exchange.tokens_for_heads(
                q_BHLK, k_BHLK, v_BHLK, tokens=tokens, meanwhile=meanwhile
            )
        else:
            (q,) = exchange.tokens_for_heads(q_BHLK, tokens=tokens, meanwhile=meanwhile)
            k, v = exchange.tokens_for_heads(k_BHLK, v_BHLK, tokens=keys[near.start : near.stop])
        rows, columns = (Span(near, n == self._shares.joint) for n in (queries, keys))
        in_order = self._function if self._wants_order and queries == keys else None
        if exchange.local_heads and self._groups.ring is not None:
            out = self._round_the_ring(q, k, v, heads, mask, rows, keys, **kwargs)
        elif exchange.local_heads and in_order is not None:
            ranges = self._masks.ranges(rows)
            back = inverse_of(ranges, q.device)
            ordered = (t.index_select(2, back) for t in (q, k, v))
            out = in_order(attention, *ordered, exchange.local_heads, mask=mask, **kwargs)
            out = out.index_select(1, order_of(ranges, q.device))
        else:
            out = self._run(attention, q, k, v, heads, mask, rows=rows, columns=columns, **kwargs)
        return exchange.heads_for_tokens(out, q.shape[3], tokens=tokens)

    def _in_halves(
        self,
        attention: Callable[..., torch.Tensor],
        q_BHLK: torch.Tensor,
        k_BHLK: torch.Tensor,
        v_BHLK: torch.Tensor,
        tokens: tuple[int, ...],
        **kwargs: Any,
    ) -> torch.Tensor:
        arriving = [
            half.send_tokens(q_BHLK, k_BHLK, v_BHLK, tokens=tokens) for half in self._halves
        ]
        self._meanwhile()
        leaving = []
        for half, arrived in zip(self._halves, arriving, strict=True):
            out = attention(*arrived(), half.local_heads, mask=None, **kwargs)
            leaving.append(half.send_heads(out, q_BHLK.shape[3], tokens=tokens))
        return together(leaving)

    def _round_the_ring(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None,
        rows: Span,
        keys: tuple[int, ...],
        **kwargs: Any,
    ) -> torch.Tensor:
        unknown = {name for name, value in kwargs.items() if value is not None} - RING_KNOWS
        if unknown:
            raise ValueError(f"ring attention does not know {sorted(unknown)}")
        assert self._groups.ring is not None

        def bias_of(place: int) -> Bias | None:
            if mask is None:
                return None
            columns = Span(self._neighbours(place), keys == self._shares.joint)
            bias: Bias = self._masks.cut(
                mask,
                heads=heads,
                rows=rows,
                columns=columns,
                finish=partial(Bias.of, dtype=q.dtype),
            )
            return bias

        out, bytes_sent = ring_attention(
            q,
            k,
            v,
            num_keys=[
                sum(keys[rank] for rank in self._neighbours(place))
                for place in range(self._shares.ring_degree)
            ],
            index=self._place,
            group=self._groups.ring,
            bias_of=bias_of,
            scale=kwargs.get("scale"),
        )
        self._ring_bytes += bytes_sent
        return out.transpose(1, 2).flatten(2)

    def _neighbours(self, place: int) -> range:
        """The ranks that exchange tokens for heads with each other, at a place of the ring."""
        degree = self._shares.ulysses_degree
        return range(place * degree, (place + 1) * degree)

    def _lengths(self, local: int) -> tuple[int, ...]:
        """Tokens of every rank: all of them, or all but references whose keys are cached."""
        without = tuple(map(sum, zip(self._shares.text, self._shares.image, strict=True)))
        for tokens in (self._shares.joint, without):
            if tokens[self._index] == local:
                return tokens
        raise ValueError(f"{local} tokens are neither {self._shares.joint} nor {without}.")
