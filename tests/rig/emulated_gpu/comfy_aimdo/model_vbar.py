"""Weights of a model on a card, in pages that come on first use and go for want of room."""

import ctypes
import mmap
import weakref

PAGE = 32 << 20
_all: "weakref.WeakSet[ModelVBAR]" = weakref.WeakSet()


class ModelVBAR:
    def __init__(self, size, device) -> None:
        import emulated_tensors as emulated

        self._ledger = emulated
        self.device, self.max_size, self.offset = device, int(size), 0
        self._map = mmap.mmap(-1, max(self.max_size, mmap.PAGESIZE))
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.base_addr = ctypes.addressof(self._anchor)
        self._pages: dict[int, int] = {}  # resident page -> generation
        self._pinned: dict[int, int] = {}
        self._clock = 0
        self._limit = None
        _all.add(self)

    def prioritize(self, malloc_async_clamp=None) -> None: ...

    def deprioritize(self) -> None: ...

    def alloc(self, num_bytes):
        self.offset = (self.offset + 511) & ~511
        if self.offset + num_bytes > self.max_size:
            raise MemoryError("VBAR OOM")
        place = self.base_addr + self.offset
        self.offset += num_bytes
        return (self, place, num_bytes)

    def _range(self, address, size):
        start = address - self.base_addr
        return range(start // PAGE, (start + max(size, 1) - 1) // PAGE + 1)

    def fault(self, address, size):
        pages = self._range(address, size)
        signature = (ctypes.c_uint32 * (size // PAGE + 2))()
        for n, page in enumerate(pages):
            if page not in self._pages:
                alive = self._ledger.alive.get(self.device, 0)
                if alive + PAGE > self._ledger.TOTAL_BYTES:
                    return None
                self._ledger.alive[self.device] = alive + PAGE
                self._clock += 1
                self._pages[page] = self._clock
            self._pinned[page] = self._pinned.get(page, 0) + 1
            signature[n] = self._pages[page]
        return signature

    def unpin(self, address, size) -> None:
        for page in self._range(address, size):
            if self._pinned.get(page):
                self._pinned[page] -= 1

    def loaded_size(self) -> int:
        return len(self._pages) * PAGE

    def set_watermark_limit(self, size_bytes) -> None: ...

    def set_watermark(self, size_bytes) -> None: ...

    def free_memory(self, size_bytes) -> int:
        freed = 0
        for page in sorted(self._pages, reverse=True):
            if freed >= size_bytes:
                break
            if not self._pinned.get(page):
                del self._pages[page]
                self._ledger.alive[self.device] -= PAGE
                freed += PAGE
        return freed

    def get_nr_pages(self) -> int:
        return -(-self.max_size // PAGE)

    def get_watermark(self) -> int:
        return self.get_nr_pages()

    def get_residency(self):
        return [
            (1 if n in self._pages else 0) | (2 if self._pinned.get(n) else 0)
            for n in range(self.get_nr_pages())
        ]

    def __del__(self) -> None:
        self._ledger.alive[self.device] = (
            self._ledger.alive.get(self.device, 0) - len(self._pages) * PAGE
        )


def vbar_fault(alloc):
    vbar, address, size = alloc
    return vbar.fault(address, size)


def vbar_unpin(alloc) -> None:
    if alloc is not None:
        vbar, address, size = alloc
        vbar.unpin(address, size)


def vbar_signature_compare(a, b) -> bool:
    return a is not None and b is not None and memoryview(a) == memoryview(b)


def vbars_reset_watermark_limits(*args) -> None: ...


def vbars_analyze(device, *args) -> int:
    return sum(v.loaded_size() for v in _all if v.device == device or not isinstance(device, int))
