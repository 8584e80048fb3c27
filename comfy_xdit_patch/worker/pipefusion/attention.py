"""Attention of one pipeline patch: its queries, and the keys of all tokens.

Runs in: worker process. PipeFusion: an approximation, but for exact calls.

Dimension letters in this file
    B  batch
    L  local sequence, this rank's shard of the patch
    H  heads
    K  head width

Ranks that share a stage exchange tokens for heads as always (``ulysses.py``). The keys and values
that come out are this patch's; ``keys`` gives those of all tokens for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.sequence_shares import SequenceShares
from comfy_xdit_patch.worker.attention.local_heads import LocalHeadsAttention
from comfy_xdit_patch.worker.attention.masks import Span
from comfy_xdit_patch.worker.pipefusion.kept_keys import KeyValue

Keys = Callable[[torch.Tensor, torch.Tensor], KeyValue]


class PatchAttention(LocalHeadsAttention):
    """ComfyUI's ``optimized_attention_override`` for one patch of a call on one rank."""

    def __init__(
        self,
        *,
        shares: SequenceShares,
        patch: int,
        index: int,
        group: dist.ProcessGroup | None,
        keys: Keys,
        function: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        """Prepare.

        Args:
            shares: of all patches, in the order in which ``keys`` returns the tokens.
            index: this rank's place in its stage.
            group: the ranks of the stage; None for one.
            keys: from keys and values of this patch to those of all tokens.
            function: a node's own ``optimized_attention_override``, to run on the local heads.
        """
        super().__init__(shares=shares, index=index, group=group, function=function)
        degree = shares.ulysses_degree
        self._patch = Span(range(patch * degree, (patch + 1) * degree), with_references=True)
        self._all = Span(range(len(shares.joint)), with_references=True)
        self._tokens = shares.joint[patch * degree : (patch + 1) * degree]
        self._keys = keys

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
        """Run attention on this rank's heads: the patch's queries, all tokens' keys.

        Shapes:
            q, k, v (B, H, L, K) -> output (B, L, H * K), as ``skip_reshape=True`` has it

        Collective:
            Every rank of the stage must call this, in the same order.
        """
        exchange, tokens = self._exchange, self._tokens
        q, k, v = exchange.tokens_for_heads(q_BHLK, k_BHLK, v_BHLK, tokens=tokens)
        if exchange.local_heads:
            k, v = self._keys(k, v)
        out = self._run(
            attention, q, k, v, heads, mask, rows=self._patch, columns=self._all, **kwargs
        )
        return exchange.heads_for_tokens(out, q.shape[3], tokens=tokens)
