"""Lay tensors out as the bytes of one flat buffer, and make them again as views of such a buffer.

Runs in: worker process.

Tensors of every class that ComfyUI has for weights (``wire/tensors.py``) become bytes, so that the
wire knows bytes only: gloo and NCCL gather no float8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from comfy_xdit_patch.wire.tensors import take_apart

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
            ForeignTensorError: it is of a class that cannot be taken apart.
        """
        if tensor.is_meta:
            raise ValueError(f"A tensor of shape {tuple(tensor.shape)} is on the meta device.")
        parts, form = take_apart(tensor)
        views = {name: self._add_plain(part) for name, part in parts.items()}
        return lambda flat: form.join({name: view(flat) for name, view in views.items()})

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
