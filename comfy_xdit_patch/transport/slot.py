"""One piece of memory that host and workers share.

Runs in: host and worker.
"""

from __future__ import annotations

import mmap

import torch

from comfy_xdit_patch.errors import MessageError

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size."""


class Slot:
    """One piece of shared memory, as seen by this process."""

    def __init__(self, number: int, fd: int, size_bytes: int) -> None:
        self.number = number
        self.size_bytes = size_bytes
        self._memory = mmap.mmap(fd, size_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], *, offset: int = 0) -> torch.Tensor:
        """The slot's bytes from ``offset`` on as a tensor; shared, not copied."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if offset + num_bytes > self.size_bytes or min(offset, *shape, 0) < 0:
            raise MessageError(f"{num_bytes} bytes do not fit slot {self.number}.")
        return self._bytes[offset : offset + num_bytes].view(dtype).view(shape)


def are_same_bytes(one: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Whether two tensors of a kind are alike, as a tensor: nothing is waited for.

    Bytes and not values: a NaN is itself, and -0.0 is not 0.0.
    """
    assert other is not None
    bits = BITS[one.element_size()]
    return (one.detach().contiguous().view(bits) == other.view(bits)).all()
