"""A file in memory, and its descriptor."""

import ctypes
import mmap
import os


class ModelMMAP:
    def __init__(self, filepath) -> None:
        self._fd = os.open(filepath, os.O_RDONLY)
        self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        self._anchor = ctypes.c_char.from_buffer(self._map)

    def get(self) -> int:
        return ctypes.addressof(self._anchor)

    def get_file_handle(self) -> int:
        return self._fd

    def bounce(self) -> bool:
        return False
