"""Lay tensors out as the bytes of one flat buffer, and make them again as views of such a buffer.

Runs in: worker process.

Three kinds of tensors occur as weights in ComfyUI: plain ones of any dtype; wrappers around inner
tensors (``__tensor_flatten__``; comfy_kitchen's and 0.3.75's ``QuantizedTensor``); and plain
subclasses with Python attributes (``GGMLTensor`` of ComfyUI-GGUF). None of them can be told apart
by bytes, so that the wire knows bytes only: gloo and NCCL gather no float8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# What CUDA's caching allocator gives. Kernels choose their way by alignment, and another way can
# mean other bits.
ALIGNMENT = 512

Recipe = Callable[[torch.Tensor], torch.Tensor]
"""Takes the flat buffer, returns the tensor as a view of it."""


class FlatLayout:
    """Places of some tensors in a flat buffer of bytes."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.parts: list[tuple[int, torch.Tensor]] = []
        """Offset and bytes of every tensor added. Views where the tensor was contiguous."""

    def add(self, tensor: torch.Tensor) -> Recipe:
        """Give a tensor a place.

        Raises:
            ValueError: the tensor has no data.
        """
        if tensor.is_meta:
            raise ValueError(f"A tensor of shape {tuple(tensor.shape)} is on the meta device.")
        if hasattr(tensor, "__tensor_flatten__"):
            return self._add_wrapper(tensor)
        kind, attributes = type(tensor), dict(tensor.__dict__)
        # GGMLTensor answers the logical shape; the bytes have another.
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            plain = tensor.as_subclass(torch.Tensor).detach()
        view = self._add_plain(plain)
        if kind in (torch.Tensor, torch.nn.Parameter):
            return view

        def make(flat: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = view(flat).as_subclass(kind)
            made.__dict__.update(attributes)
            return made

        return make

    def _add_wrapper(self, tensor: Any) -> Recipe:
        kind, size, stride = type(tensor), tensor.size(), tensor.stride()
        names, context = tensor.__tensor_flatten__()
        recipes = {name: self.add(getattr(tensor, name)) for name in names}

        def make(flat: torch.Tensor) -> torch.Tensor:
            inner = {name: recipe(flat) for name, recipe in recipes.items()}
            made: torch.Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
            return made

        return make

    def _add_plain(self, tensor: torch.Tensor) -> Recipe:
        shape, dtype = tensor.shape, tensor.dtype
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        start, end = self.num_bytes, self.num_bytes + data.numel()
        self.parts.append((start, data))
        self.num_bytes = round_up(end, ALIGNMENT)
        return lambda flat: flat[start:end].view(dtype).view(shape)

    def copy_range(self, start: int, out: torch.Tensor) -> None:
        """Copy the buffer's bytes from ``start`` on to ``out``, without making the buffer."""
        end = start + out.numel()
        for offset, data in self.parts:
            first, last = max(start, offset), min(end, offset + data.numel())
            if first < last:
                out[first - start : last - start].copy_(data[first - offset : last - offset])


def round_up(number: int, multiple: int) -> int:
    """Return the next multiple at or above a number."""
    return -(-number // multiple) * multiple
