"""Dynamic VRAM on emulated cards: what ComfyUI calls of comfy-aimdo, which needs a driver.

Runs in: every process of a rig server with emulated cards, as the package ``comfy_aimdo``.

    model_mmap     a file in memory; the weights of a loaded model lie there
    host_buffer    CPU memory that weights pass on their way to a card
    model_vbar     a model's weights on a card, in pages that come at first use and go for others
    vram_buffer    a place on a card for weights that find no page

A page that goes is filled with ones, which are NaN in every floating dtype: whoever uses a weight
that is not there any more spoils the image.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import emulated_allocator as allocator
import emulated_tensors as tensors
import torch
from emulated_memory import HostBuffer, Memory, ModelMMAP, Place, VRAMBuffer, read

PAGE_BYTES = 32 << 20
ALIGNED_BYTES = 512


class ModelVBAR(Memory):
    """The weights of one model on one card."""

    everywhere: ClassVar[weakref.WeakSet[ModelVBAR]] = weakref.WeakSet()
    _numbers: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, size: int, device: int) -> None:
        super().__init__(size)
        self.device, self._size, self._end = device, int(size), 0
        self._arrived: dict[int, int] = {}  # which pages are on the card, and since when
        self._users: dict[int, int] = {}
        self.prioritize()
        self.everywhere.add(self)

    def __del__(self) -> None:
        allocator.give_back_to_driver(self.device, self.loaded_size())

    def prioritize(self, malloc_async_clamp: int | None = None) -> None:
        self.priority = next(self._numbers)

    def alloc(self, num_bytes: int) -> Place:
        start = -(-self._end // ALIGNED_BYTES) * ALIGNED_BYTES
        if start + num_bytes > self._size:
            raise MemoryError("There are more weights than memory was reserved for.")
        self._end = start + num_bytes
        return self, self.address + start, num_bytes

    def fault(self, address: int, size: int) -> Any:
        """Bring the pages of a weight; None without room. The answer differs if one came anew."""
        pages = self._pages(address, size)
        for page in pages:
            if page not in self._arrived:
                if not self._found_room():
                    return None
                self._arrived[page] = next(self._numbers)
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1
        length = size // PAGE_BYTES + 2  # for a size always the same
        return (ctypes.c_uint32 * length)(*(self._arrived[page] for page in pages))

    def unpin(self, address: int, size: int) -> None:
        for page in self._pages(address, size):
            self._users[page] = max(0, self._users.get(page, 0) - 1)

    def loaded_size(self) -> int:
        return len(self._arrived) * PAGE_BYTES

    def free_memory(self, size_bytes: float) -> int:
        """Take pages off the card, the last ones first, but for those in use."""
        taken = 0
        for page in sorted(self._arrived, reverse=True):
            if taken >= size_bytes:
                break
            if not self._users.get(page):
                del self._arrived[page]
                allocator.give_back_to_driver(self.device, PAGE_BYTES)
                start = page * PAGE_BYTES
                ctypes.memset(self.address + start, 0xFF, min(PAGE_BYTES, self._size - start))
                taken += PAGE_BYTES
        return taken

    def _pages(self, address: int, size: int) -> range:
        first = address - self.address
        return range(first // PAGE_BYTES, (first + max(size, 1) - 1) // PAGE_BYTES + 1)

    def _found_room(self) -> bool:
        """Count one page more; models that were asked for longer ago make room for it."""
        others = sorted(self.everywhere, key=lambda bar: bar.priority)
        others = [bar for bar in others if bar.device == self.device and bar is not self]
        while not allocator.found_room(self.device, PAGE_BYTES):
            if not any(bar.free_memory(PAGE_BYTES) for bar in others):
                return False
        return True


def vbar_fault(place: Any) -> Any:
    return place[0].fault(*place[1:])


def vbar_unpin(place: Any) -> None:
    if place is not None:
        place[0].unpin(*place[1:])


def vbar_signature_compare(one: Any, other: Any) -> bool:
    return one is not None and other is not None and list(one) == list(other)


def vbars_analyze(device: int | None = None) -> int:
    bars = ModelVBAR.everywhere
    return sum(bar.loaded_size() for bar in bars if device in (None, bar.device))


def aimdo_to_tensor(place: Place, device: Any) -> torch.Tensor:
    memory, address, size = place
    where = torch.device("cuda", torch.device(device).index or 0)
    return tensors.Emulated(memory.tensor(address, size), where, counted=False)


def hostbuf_to_tensor(buffer: HostBuffer) -> torch.Tensor:
    return buffer.tensor(buffer.address, buffer.size)


def read_file_to_device(
    file_obj: Any,
    file_offset: int,
    size: int,
    stream: int,
    device_ptr: int,
    device: int,
    mark_cold: bool = True,
) -> None:
    read(file_obj, file_offset, size, device_ptr)


def _init(devices: Iterable[Any]) -> bool:
    """Have a context on each card, as comfy-aimdo has. Newer versions are told a headroom too."""
    for device in devices:
        allocator.touch(device[0] if isinstance(device, tuple) else device)
    return True


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


def _levels() -> Iterator[str]:
    for level in ("critical", "error", "warning", "info", "detail", "debug"):
        yield f"set_log_{level}"


def install() -> None:
    """Put the package in the place of comfy-aimdo's, installed or not."""
    modules: dict[str, dict[str, Any]] = {
        "control": {"init": _always(True), "init_devices": _init, "analyze": _always(None)}
        | dict.fromkeys(_levels(), _always(None)),
        "host_buffer": {"HostBuffer": HostBuffer, "read_file_to_device": read_file_to_device},
        "model_mmap": {"ModelMMAP": ModelMMAP},
        "model_vbar": {
            "ModelVBAR": ModelVBAR,
            "vbar_fault": vbar_fault,
            "vbar_unpin": vbar_unpin,
            "vbar_signature_compare": vbar_signature_compare,
            "vbars_analyze": vbars_analyze,
            "vbars_reset_watermark_limits": _always(None),
        },
        "torch": {"aimdo_to_tensor": aimdo_to_tensor, "hostbuf_to_tensor": hostbuf_to_tensor},
        "vram_buffer": {"VRAMBuffer": VRAMBuffer},
    }
    package: Any = types.ModuleType("comfy_aimdo", __doc__)
    package.__path__ = []
    sys.modules["comfy_aimdo"] = package
    for name, contents in modules.items():
        module = types.ModuleType(f"comfy_aimdo.{name}")
        vars(module).update(contents)
        setattr(package, name, module)
        sys.modules[module.__name__] = module
