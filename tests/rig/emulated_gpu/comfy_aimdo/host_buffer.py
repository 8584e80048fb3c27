"""Page-locked memory of the host that grows; a device address is a CPU address here."""

import ctypes
import mmap
import os


def _fd(file_obj) -> int:
    return file_obj if isinstance(file_obj, int) else file_obj.fileno()


def _read(fd: int, offset: int, size: int, address: int) -> None:
    view = (ctypes.c_char * size).from_address(address)
    done = 0
    while done < size:
        done += os.preadv(fd, [memoryview(view)[done:]], offset + done)


def read_file_to_device(
    file_obj, file_offset, size, stream, device_ptr, device, mark_cold=True
) -> None:
    _read(_fd(file_obj), file_offset, size, device_ptr)


def cleanup_file_reader() -> None: ...


class HostBuffer:
    def __init__(self, size, prewarm=0, max_grow_size=0, mark_cold=True) -> None:
        self._map = mmap.mmap(-1, max(int(size), int(max_grow_size), mmap.PAGESIZE))
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.size = int(size)

    def get_raw_address(self) -> int:
        return ctypes.addressof(self._anchor)

    def extend(self, size, reallocate=False, register=True) -> int:
        if self.size + int(size) > len(self._map):
            raise RuntimeError("HostBuffer.extend failed")
        start = self.get_raw_address() + self.size
        self.size += int(size)
        return start

    def read_file_slice(
        self, file_obj, file_offset, size, offset=0, stream=0, device_ptr=0, device=-1
    ) -> None:
        _read(_fd(file_obj), file_offset, size, self.get_raw_address() + offset)
        if device_ptr:
            ctypes.memmove(device_ptr, self.get_raw_address() + offset, size)
        self.size = max(self.size, int(offset) + int(size))

    def register(self, offset, size) -> None: ...

    def unregister(self, offset) -> None: ...

    def truncate(self, size, do_unregister=True) -> None:
        self.size = int(size)
