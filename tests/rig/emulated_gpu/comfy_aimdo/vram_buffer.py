"""A buffer on a device through which weights are cast."""

import ctypes
import mmap


class VRAMBuffer:
    def __init__(self, max_size, device) -> None:
        self.device, self.max_size = device, max_size
        self._map = mmap.mmap(-1, int(max_size))
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.base_addr = ctypes.addressof(self._anchor)
        self._allocated = 0

    def size(self) -> int:
        return self._allocated

    def get(self, size, offset=0):
        self._allocated = max(self._allocated, int(size) + int(offset))
        return (self, self.base_addr + int(offset), int(size))
