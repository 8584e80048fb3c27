"""Memory by address, as ComfyUI gets it from comfy-aimdo: files, buffers, places on a card.

Runs in: every process of a rig server with emulated cards.

All addresses are those of CPU memory, a card's too, reserved and not used until written.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import torch

NOT_RESERVED = 0x4000  # MAP_NORESERVE, which Python 3.11 does not name

Place = tuple["Memory", int, int]
"""Memory, address and size: what ComfyUI is given for a part of a card's memory."""


class Memory:
    """A range of addresses."""

    def __init__(self, size: int, fd: int = -1) -> None:
        flags = mmap.MAP_PRIVATE | (NOT_RESERVED | mmap.MAP_ANONYMOUS if fd < 0 else 0)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(fd, max(int(size), 1) if fd < 0 else 0, flags, protection)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def tensor(self, address: int, size: int) -> torch.Tensor:
        """Bytes of this memory as a tensor of the CPU, which keeps the memory."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        offset = address - self.address
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=offset, count=size)


def read(file: Any, file_offset: int, size: int, address: int) -> None:
    """Read a part of a file to an address."""
    fd = file if isinstance(file, int) else file.fileno()
    view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    done = 0
    while done < size:
        got = os.preadv(fd, [view[done:]], file_offset + done)
        if not got:
            raise RuntimeError(f"The file ends {size - done} bytes too early.")
        done += got


class ModelMMAP(Memory):
    """A file in memory. What is written there stays in this process."""

    def __init__(self, filepath: Any) -> None:
        self._file = open(filepath, "rb")  # noqa: SIM115 - ComfyUI reads by its descriptor
        super().__init__(0, self._file.fileno())

    def get(self) -> int:
        return self.address

    def get_file_handle(self) -> int:
        return self._file.fileno()

    def bounce(self) -> None: ...


class HostBuffer(Memory):
    """CPU memory that grows at its end."""

    def __init__(
        self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True
    ) -> None:
        self.capacity = max(int(size), int(max_grow_size))
        super().__init__(self.capacity)
        self.size = int(size)

    def get_raw_address(self) -> int:
        return self.address

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + int(size) > self.capacity:
            raise RuntimeError("The buffer cannot grow any further.")
        self.size += int(size)
        return self.address + self.size - int(size)

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = int(size)

    def read_file_slice(
        self,
        file_obj: Any,
        file_offset: int,
        size: int,
        offset: int = 0,
        stream: int = 0,
        device_ptr: int = 0,
        device: int | None = None,
    ) -> None:
        """Read a part of a file into this buffer, and on to a card."""
        read(file_obj, file_offset, size, self.address + offset)
        self.size = max(self.size, offset + size)
        if device_ptr:
            ctypes.memmove(device_ptr, self.address + offset, size)


class VRAMBuffer(Memory):
    """Memory of a card that everything passes in turn; ComfyUI reserves far more than it uses."""

    def __init__(self, max_size: int, device: int) -> None:
        super().__init__(max_size)
        self._used = 0

    def size(self) -> int:
        return self._used

    def get(self, size: int, offset: int = 0) -> Place:
        self._used = max(self._used, int(offset) + int(size))
        return self, self.address + int(offset), int(size)
