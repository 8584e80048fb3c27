"""Quantised weights as tensors, read from a GGUF file.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import torch

PLAIN = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}


class QuantisedTensor(torch.Tensor):
    """Bytes of a quantised matrix that claim the shape of its numbers."""

    tensor_type: Any
    tensor_shape: torch.Size
    patches: list[Any]
    is_largest_weight = False

    @staticmethod
    def __new__(cls: type[QuantisedTensor], data: torch.Tensor, **_: Any) -> QuantisedTensor:
        return torch.Tensor._make_subclass(cls, data, False)

    def __init__(self, data: torch.Tensor, *, tensor_type: Any, tensor_shape: torch.Size) -> None:
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, []

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Return the shape of the numbers, which is what ComfyUI detects models by."""
        return getattr(self, "tensor_shape", None) or self.size()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Move the bytes; what they mean moves along."""
        moved = super().to(*args, **kwargs)
        moved.tensor_type = getattr(self, "tensor_type", None)
        moved.tensor_shape = getattr(self, "tensor_shape", moved.size())
        moved.patches = list(getattr(self, "patches", []))
        return moved

    def clone(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the weight itself: nobody writes into quantised bytes."""
        return self

    def detach(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the weight itself, so that a Parameter keeps the class."""
        return self


def is_quantised(tensor: Any) -> bool:
    """Whether these are bytes that have to be turned into numbers."""
    kind = getattr(tensor, "tensor_type", None)
    return kind is not None and kind not in PLAIN


def dequantise(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of a weight, without its patches."""
    plain = tensor.as_subclass(torch.Tensor)
    if not is_quantised(tensor):
        return plain.to(dtype)
    numbers = gguf.quants.dequantize(plain.cpu().numpy(), tensor.tensor_type)  # type: ignore[attr-defined]
    return torch.from_numpy(numbers).reshape(tensor.shape).to(plain.device, dtype)


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a GGUF file; they stay mapped, not copied."""
    state: dict[str, torch.Tensor] = {}
    for entry in gguf.GGUFReader(path).tensors:
        shape = torch.Size(int(size) for size in reversed(entry.shape))
        with warnings.catch_warnings():  # nobody writes into the mapping
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            data = torch.from_numpy(entry.data)
        if entry.tensor_type in PLAIN:
            data = data.view(*shape)
        state[entry.name] = QuantisedTensor(data, tensor_type=entry.tensor_type, tensor_shape=shape)
    quantised = [tensor for tensor in state.values() if is_quantised(tensor)]
    if quantised:
        max(quantised, key=torch.Tensor.numel).is_largest_weight = True  # type: ignore[attr-defined]
    return state
