"""Layers that turn quantised weights into numbers at each call.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.ops
import torch

from .tensors import dequantise, is_quantised


class LazyLinear(comfy.ops.manual_cast.Linear):  # type: ignore[misc]
    """A linear layer without a weight until one is loaded."""

    comfy_cast_weights = True
    has_largest_weight = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight: Any = None
        self.bias: Any = None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None:
                setattr(self, name, torch.nn.Parameter(value, requires_grad=False))
        self.has_largest_weight = getattr(self.weight, "is_largest_weight", False)
        if self.weight is None:
            missing_keys.append(prefix + "weight")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Not the numbers, only their names and sizes: ComfyUI asks for nothing else.
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                destination[prefix + name] = torch.zeros_like(value, device="meta")
        if self.has_largest_weight:  # room for its numbers, which no parameter of this name holds
            room = torch.empty(self.weight.shape, dtype=torch.float16, device="meta")
            destination[prefix + "temp.weight"] = room

    def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply by the numbers, patched."""
        if not is_quantised(self.weight):
            out = super().forward_comfy_cast_weights(input)
            return out.as_subclass(torch.Tensor)
        weight = _numbers(self.weight.to(input.device), input.dtype)
        bias = None if self.bias is None else _numbers(self.bias.to(input.device), input.dtype)
        return torch.nn.functional.linear(input, weight, bias)


def _numbers(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    numbers = dequantise(tensor, dtype)
    for patches, key in getattr(tensor, "patches", []):
        numbers = comfy.lora.calculate_weight(patches, numbers, key)
    return numbers.to(dtype)


class Operations(comfy.ops.manual_cast):  # type: ignore[misc]
    """ComfyUI's layers, with ours where FLUX has quantised weights."""

    Linear = LazyLinear
