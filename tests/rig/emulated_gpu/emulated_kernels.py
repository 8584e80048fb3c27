"""What a card has other kernels for than a CPU: attention that also returns its log-sum-exp.

Runs in: every process of a rig server with emulated cards.

A card's fast kernel takes 16 bits and no mask, its efficient one the rest; each is named for the
card, and computed by the CPU's.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
FLASH, EFFICIENT = 1, 2
LSE_STEP = 32
"""The efficient kernel rounds the number of queries up to so many in its log-sum-exp."""


def _choice(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    return FLASH if mask is None and query.dtype != torch.float32 else EFFICIENT


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **options: Any) -> Any:
    if q.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=options.get("scale"))
    lengths = torch.empty(0), torch.empty(0), q.shape[2], k.shape[2]
    return *out, *lengths, *(torch.empty(0) for _ in range(3))


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, *_: Any, **options: Any
) -> Any:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=options.get("scale")
    )
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % LSE_STEP), value=float("inf"))
    return out, lse, torch.empty(0), torch.empty(0)


KERNELS = {
    aten._fused_sdp_choice.default: _choice,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
}
"""By the ATen call that they stand for."""
