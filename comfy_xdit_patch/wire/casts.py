"""Weights that ComfyUI casts for each call, and that can be held as they are multiplied instead.

Runs in: host, which counts them, and worker, which casts them.

bf16 and fp16 have every value of float8, so a product with a weight that was cast before has the
bits of one with a weight that is cast for the call.
"""

from __future__ import annotations

from typing import Any

import torch

from comfy_xdit_patch.wire.tensors import PLAIN_CLASSES


def can_cast_once(module: Any, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight is plain float8, of a linear that casts it for each call and no more.

    Args:
        module: whose weight it is; None where that is not known.
        dtype: in which the weight is stored, as ComfyUI computes with it.
    """
    is_float8 = dtype.is_floating_point and dtype.itemsize == 1
    is_plain = is_float8 and type(weight) in PLAIN_CLASSES
    return is_plain and getattr(module, "comfy_cast_weights", False) and only_casts(type(module))


def only_casts(cls: type[Any]) -> bool:
    """Whether a class of linears casts what it multiplies, as ComfyUI does, and nothing else."""
    import comfy.ops

    plain = comfy.ops.disable_weight_init.Linear
    return issubclass(cls, plain) and all(
        getattr(cls, name) is getattr(plain, name)
        for name in ("forward", "forward_comfy_cast_weights")
    )
