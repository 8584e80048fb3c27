"""What our overrides of attention share: a rank's heads, and the function that runs on them.

Runs in: worker process.

Dimension letters in this file
    B  batch
    S  tokens of the ranks that exchange tokens for heads
    G  local heads, those that this rank computes attention for
    K  head width
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.sequence_shares import SequenceShares
from comfy_xdit_patch.planning.transfers import TransferDtype
from comfy_xdit_patch.worker.attention.masks import RankMasks, Span
from comfy_xdit_patch.worker.attention.ulysses import HeadExchange

T = TypeVar("T", bound="LocalHeadsAttention")


class LocalHeadsAttention:
    """Attention on this rank's heads, between the two exchanges of tokens and heads."""

    def __init__(
        self,
        *,
        shares: SequenceShares,
        index: int,
        group: dist.ProcessGroup | None,
        function: Callable[..., torch.Tensor] | None,
        dtype: TransferDtype = "exact",
    ) -> None:
        """Prepare.

        Args:
            shares: tokens and heads of the ranks.
            index: this rank's place among those of ``shares``.
            group: the ranks that exchange tokens for heads; None for one.
            function: a node's own ``optimized_attention_override``, to run on the local heads.
            dtype: in which form heads travel.
        """
        self._exchange = HeadExchange(
            heads=shares.heads, index=index % shares.ulysses_degree, group=group, dtype=dtype
        )
        self._masks = RankMasks(shares, index)
        self._function = function

    def prescribed(self: T, function: Callable[..., torch.Tensor]) -> T:
        """Return this with the checkpoint's function underneath, unless a node chose one."""
        if self._function is not None:
            return self
        other = copy.copy(self)
        other._function = lambda _, *args, **kwargs: function(*args, **kwargs)
        return other

    @property
    def bytes_sent(self) -> int:
        """What this rank sent to others."""
        return self._exchange.bytes_sent

    def _run(
        self,
        attention: Callable[..., torch.Tensor],
        q_BGSK: torch.Tensor,
        k_BGSK: torch.Tensor,
        v_BGSK: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None,
        *,
        rows: Span,
        columns: Span,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return (B, S, G * K); a rank without heads computes nothing, and has nothing to send.

        Args:
            heads: of the whole call.
            mask: of the whole sequence; ``rows`` and ``columns`` say which part of it is meant.
        """
        local_heads = self._exchange.local_heads
        if not local_heads:
            return q_BGSK.new_empty((q_BGSK.shape[0], q_BGSK.shape[2], 0))
        if mask is not None:
            mask = self._masks.cut(mask, heads=heads, rows=rows, columns=columns)
        run = attention if self._function is None else partial(self._function, attention)
        return run(q_BGSK, k_BGSK, v_BGSK, local_heads, mask=mask, **kwargs)
