"""Attention over a part of the keys, with what it takes to join such parts exactly.

Runs in: worker process.

Dimension letters in this file
    B  batch
    H  heads
    L  queries
    M  keys of this part
    K  head width

The log-sum-exp of a query's scores over a part of the keys is the part's weight among all parts.
ComfyUI's attention functions do not return it; these operators of torch do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_aten = torch.ops.aten
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FLASH, EFFICIENT = 1, 2
"""As ``torch._fused_sdp_choice`` numbers them (aten/src/ATen/SDPBackend.h)."""
BIAS_ALIGNMENT = 16
"""The efficient kernel reads a bias in steps of so many keys."""
MAX_SCORES = 1 << 26
"""How many scores are computed at a time where no kernel does it."""


@dataclass(frozen=True, slots=True)
class Bias:
    """An additive mask (B, H, L, M), any size but M may be 1; queries that see no key at all.

    Kernels differ in what they return for such a query (torch's CPU kernel: a log-sum-exp of 0,
    which would count). Nobody asks whether there are any: the answer would be waited for.
    """

    values: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, dtype: torch.dtype) -> Bias:
        """Turn a mask as attention takes it, boolean or additive, into one.

        Args:
            dtype: of a boolean mask's values; an additive one keeps its own.
        """
        while mask.ndim < 4:  # (L, M) or, as ComfyUI has it, (B, L, M)
            mask = mask.unsqueeze(-3)
        if mask.dtype == torch.bool:
            values = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        else:
            values = mask
        return cls(values, values.isneginf().all(-1))


def attention_with_lse(
    q_BHLK: torch.Tensor,
    k_BHMK: torch.Tensor,
    v_BHMK: torch.Tensor,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (B, H, L, K) and the log-sum-exp (B, H, L) of each query."""
    q, k, v = q_BHLK, k_BHMK, v_BHMK
    values = None if bias is None else bias.values
    with sdpa_kernel(KERNELS):  # Not cuDNN's kernel, which returns something else.
        kernel = torch._fused_sdp_choice(q, k, v, values, 0.0, False, scale=scale)
    if kernel == FLASH and not q.is_cuda:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=values, scale=scale
        )
    elif kernel == FLASH:
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif kernel == EFFICIENT:
        out, lse = _efficient(q, k, v, values, scale)
    else:
        out, lse = plain_attention(q, k, v, values, scale)
    if bias is not None:
        out = out.masked_fill(bias.hidden.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(bias.hidden, float("-inf"))
    return out, lse


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, values: torch.Tensor | None, scale: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if values is not None:
        # In whole steps of memory, as F.scaled_dot_product_attention has it too.
        num_keys, values = k.shape[2], values.to(q.dtype)
        padded = F.pad(values.expand(*values.shape[:3], num_keys), (0, -num_keys % BIAS_ALIGNMENT))
        values = padded[..., :num_keys].expand(*q.shape[:3], num_keys)
    out, lse = _aten._scaled_dot_product_efficient_attention(
        q, k, v, values, compute_log_sumexp=True, scale=scale
    )[:2]
    return out, lse[..., : q.shape[2]]  # which it rounds up


def plain_attention(
    q_BHLK: torch.Tensor,
    k_BHMK: torch.Tensor,
    v_BHMK: torch.Tensor,
    values: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same by plain mathematics, in float32 at least, some queries at a time."""
    q, k, v = (accumulator(t) for t in (q_BHLK, k_BHMK, v_BHMK))
    if values is not None:
        values = accumulator(values).expand(*values.shape[:2], q.shape[2], -1)
    rows = max(1, MAX_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    outs, lses = [], []
    for first in range(0, q.shape[2], rows):
        part = slice(first, first + rows)
        scores = q[:, :, part] @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if values is not None:
            scores = scores + values[:, :, part]
        lse = scores.logsumexp(-1)
        outs.append(torch.exp(scores - lse.unsqueeze(-1)) @ v)
        lses.append(lse)
    return torch.cat(outs, 2).to(q_BHLK.dtype), torch.cat(lses, 2)


def accumulator(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the precision in which parts are summed."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


class JoinedParts:
    """The output over all parts of the keys that were added."""

    def __init__(self) -> None:
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, out_BHLK: torch.Tensor, lse_BHL: torch.Tensor) -> None:
        """Add one part: what it gave and how much it weighs."""
        part, lse = accumulator(out_BHLK), accumulator(lse_BHL)
        if self._out is None or self._lse is None:
            self._out, self._lse = part, lse
            return
        total = torch.logaddexp(self._lse, lse)
        # A query that saw no key yet has no weight: minus infinity from itself is no number.
        before, now = (
            torch.exp(weight - total).masked_fill_(total.isneginf(), 0.0).unsqueeze(-1)
            for weight in (self._lse, lse)
        )
        self._out = self._out.mul_(before).addcmul_(part, now)
        self._lse = total

    def result(self, dtype: torch.dtype) -> torch.Tensor:
        """Return (B, H, L, K)."""
        assert self._out is not None, "a part was added"
        return self._out.to(dtype)
