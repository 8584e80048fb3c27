"""Bodies that ask which linears of this ComfyUI may have their weights cast once.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch

from comfy_xdit_patch.wire.casts import can_cast_once

FP8 = torch.float8_e4m3fn


def which() -> dict[str, bool]:
    """Say it of a linear of each class, and of other layers and weights of the first."""
    classes: dict[str, Any] = {
        "cast for each call": comfy.ops.manual_cast.Linear,
        "as stored": comfy.ops.disable_weight_init.Linear,
        "multiplied in fp8": comfy.ops.fp8_ops.Linear,
        "torch's own": torch.nn.Linear,
    }
    if hasattr(comfy.ops, "scaled_fp8_ops"):
        classes["scaled"] = comfy.ops.scaled_fp8_ops(override_dtype=FP8).Linear
    layers = {name: cls(4, 4, device="cpu", dtype=torch.bfloat16) for name, cls in classes.items()}
    weight = torch.zeros(4, 4, dtype=FP8)
    cast = layers["cast for each call"]
    own = type("Own", (torch.Tensor,), {})
    return {
        **{name: can_cast_once(layer, weight, FP8) for name, layer in layers.items()},
        "a norm": can_cast_once(comfy.ops.manual_cast.LayerNorm(4), weight[0], FP8),
        "bf16": can_cast_once(cast, weight.bfloat16(), torch.bfloat16),
        "uint8": can_cast_once(cast, weight.view(torch.uint8), torch.uint8),
        "a class of its own": can_cast_once(cast, weight.as_subclass(own), FP8),
    }
