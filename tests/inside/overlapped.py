"""Bodies that have a single block of ComfyUI's leave columns of its first linear for later.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from comfy.ldm.flux.layers import ModulationOut, SingleStreamBlock

from comfy_xdit_patch.worker.shard.later_columns import LaterColumns

WIDTH, HEADS, TOKENS = 512, 4, 70


def later_columns(operations: str, stored: str, computed: str) -> list[bool]:
    """Compute a block at once, and with columns later.

    Args:
        operations: of ``comfy.ops``.
        stored: dtype of the weights.
        computed: dtype of the tokens.

    Returns:
        Whether columns were left when attention was called, and whether the results are equal.
    """
    dtype = getattr(torch, computed)
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    was_left = []

    def attention(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        was_left.append(later._left is not None)
        later.compute()
        out: torch.Tensor = function(*args, **kwargs)
        return out

    with torch.inference_mode():
        block = SingleStreamBlock(
            WIDTH,
            HEADS,
            modulation=False,
            dtype=getattr(torch, stored),
            operations=getattr(comfy.ops, operations),
        )
        for parameter in block.parameters():
            parameter.copy_(numbers(*parameter.shape) * 0.05)
        later = LaterColumns(SimpleNamespace(single_blocks=[block]))
        x = numbers(1, TOKENS, WIDTH).to(dtype)
        mod = ModulationOut(*(numbers(1, 1, WIDTH).to(dtype) for _ in range(3)))
        options = {"optimized_attention_override": attention}
        at_once = block(x.clone(), vec=mod, pe=None, transformer_options=options)
        with later.left():
            in_turn = block(x.clone(), vec=mod, pe=None, transformer_options=options)
    assert was_left[0] is False
    return [was_left[1], torch.equal(at_once, in_turn)]
