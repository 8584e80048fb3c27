"""One piece of memory that host and workers share.

Runs in: host and worker.

It is an anonymous file (memfd): no name in /dev/shm, no limit of /dev/shm, and the kernel frees it
when the last process that maps it ends, however that process ends.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import weakref
from functools import cached_property
from typing import Any

import torch

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.wire.registered import register

# A slot that another process made shorter would end this one with SIGBUS.
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Slot:
    """One piece of shared memory, as seen by this process."""

    def __init__(self, number: int, fd: int, size_bytes: int) -> None:
        self.number = number
        self.size_bytes = size_bytes
        self._memory = mmap.mmap(fd, size_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._viewed: tuple[Any, torch.Tensor] | None = None
        self._lease: weakref.ref[memoryview] | None = None

    @classmethod
    def create(cls, number: int, size_bytes: int) -> tuple[Slot, int]:
        """Make memory, in whole pages. The caller closes the file descriptor."""
        size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("comfy-xdit-slot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
        return cls(number, fd, size_bytes), fd

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], *, offset: int = 0) -> torch.Tensor:
        """The slot's bytes from ``offset`` on as a tensor; shared, not copied."""
        kind = dtype, shape, offset
        if self._viewed is None or self._viewed[0] != kind:
            self._viewed = kind, self._view(dtype, shape, offset)
        return self._viewed[1]

    def handed_out(
        self, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        """What lies in the slot, as a tensor of its own on a device.

        In CPU memory it is the slot itself, which ``is_lent`` then.
        """
        if device.type != "cpu":
            return self.view(dtype, shape).to(device, copy=True)
        self._check_fits(dtype, shape)
        lease = memoryview(self._memory)  # The storage refers to it, and so do all views.
        self._lease = weakref.ref(lease)
        return torch.frombuffer(lease, dtype=dtype, count=math.prod(shape)).view(shape)

    @property
    def is_lent(self) -> bool:
        """Whether a tensor that was handed out lies in it, and somebody has it still."""
        return self._lease is not None and self._lease() is not None

    @cached_property
    def is_registered(self) -> bool:
        """Whether a GPU copies from and to it by itself. Asking makes it so, if it can be."""
        return register(self._bytes, self)

    def _check_fits(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> int:
        num_bytes = dtype.itemsize * math.prod(shape)
        if offset + num_bytes > self.size_bytes or min(offset, *shape, 0) < 0:
            raise MessageError(f"{num_bytes} bytes do not fit slot {self.number}.")
        return num_bytes

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        num_bytes = self._check_fits(dtype, shape, offset)
        with torch.inference_mode(False):  # Others could not be written to outside of that mode.
            return self._bytes[offset : offset + num_bytes].view(dtype).view(shape)
