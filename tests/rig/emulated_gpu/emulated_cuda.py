"""Put emulated cards into this process: ``torch.cuda`` and process groups as with GPUs.

Runs in: every process of a rig server with emulated cards; the shim imports it at start.

Which cards there are: ``emulated_cards.py``; their memory: ``emulated_allocator.py`` for each
process, ``emulated_ledger.py`` for all; NCCL: ``emulated_exchanges.py``. Streams do nothing, and an
event notes the time. ``inference_mode`` is ``no_grad``: views of inference tensors cannot be
wrapped.
"""

from __future__ import annotations

import contextlib
import threading
import types
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

import emulated_aimdo
import emulated_allocator as allocator
import emulated_exchanges
import emulated_graphs as graphs
import emulated_modes
import torch

_current = threading.local()


def index_of(device: Any = None) -> int:
    """Index of a device as torch's functions take it."""
    if device is None:
        return int(getattr(_current, "index", 0))
    return device if isinstance(device, int) else torch.device(device).index or 0


def properties(device: Any = None) -> types.SimpleNamespace:
    """What torch says of a card."""
    card = allocator.card_of(index_of(device))
    major, minor = card.kind.capability
    return types.SimpleNamespace(
        name=f"{card.kind.name} (emulated)",
        total_memory=card.total_bytes,
        major=major,
        minor=minor,
        multi_processor_count=card.kind.num_processors,
        uuid=uuid.UUID(card.uuid.removeprefix("GPU-")),
        is_integrated=0,
        gcnArchName="",
        pci_domain_id=0,
        pci_bus_id=card.number + 1,
        pci_device_id=0,
        L2_cache_size=72 << 20,
        warp_size=32,
    )


class Event:
    """Notes when it was recorded. In a graph only an external one is recorded, by each replay."""

    def __init__(self, enable_timing: bool = False, external: bool = False, **_: Any) -> None:
        self.at = 0.0
        self._is_external = external
        self._is_captured = False

    def record(self, stream: Any = None) -> None:
        graph = graphs.capturing()
        self._is_captured = graph is not None and not self._is_external
        if graph is None:
            self._note()
        elif self._is_external:
            graph.add(self._note)

    def query(self) -> bool:
        self.synchronize()
        return True

    def synchronize(self) -> None:
        graphs.forbid("the host waits for an event")
        if self._is_captured:
            raise RuntimeError("CUDA error: event was last recorded in a capturing stream")

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        for event in (self, other):
            event.synchronize()
        return 1e3 * (other.at - self.at)

    def _note(self) -> None:
        self.at = graphs.now_s()


class Generator(torch.Generator):
    """Random numbers of a card are those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg,no-any-return]


class Stream:
    """Everything has been done when a call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.cuda_stream = torch.device(device or "cuda:0"), 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        graphs.forbid("the host waits for a stream")

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        graphs.forbid("the host asks for a stream")
        return True


@contextlib.contextmanager
def _nothing(_: Any) -> Iterator[None]:
    yield


def _set_device(device: Any) -> None:
    _current.index = index_of(device)


def _statistics(device: Any = None) -> dict[str, int]:
    index = index_of(device)
    return {
        "active_bytes.all.current": allocator.active(index),
        "reserved_bytes.all.current": allocator.reserved(index),
    }


def _runtime() -> types.SimpleNamespace:
    locked: dict[int, int] = {}

    def register(address: int, size: int, flags: int = 0) -> int:
        locked[address] = size
        allocator.pin(size)
        return 0

    def unregister(address: int) -> int:
        allocator.pin(-locked.pop(address, 0))
        return 0

    return types.SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=unregister, cudaGetLastError=lambda *_: 0
    )


def _pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    copy = tensor.clone()
    size = copy.nbytes
    allocator.pin(size)
    weakref.finalize(copy, allocator.pin, -size)
    return copy


def _has_peers(device: int, peer: int) -> bool:
    return all(allocator.card_of(index).kind.has_peers for index in (device, peer))


def _put_into_torch() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: len(allocator.visible_cards()) > 0
    cuda.device_count = lambda: len(allocator.visible_cards())
    cuda.get_device_capability = lambda device=None: (
        allocator.card_of(index_of(device)).kind.capability
    )
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.can_device_access_peer = _has_peers
    cuda.get_allocator_backend = lambda: "native"
    for name in ("ipc_collect", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.synchronize = lambda *_: graphs.forbid("the host waits for a card")
    for module in (cuda, cuda.graphs):
        module.CUDAGraph = graphs.CUDAGraph
        module.graph_pool_handle = graphs.graph_pool_handle
        module.is_current_stream_capturing = lambda: graphs.capturing() is not None
    cuda.empty_cache = allocator.empty_cache
    cuda.reset_peak_memory_stats = lambda device=None: allocator.forget_peak(index_of(device))
    stream = Stream()
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.current_device, cuda.set_device = index_of, _set_device
    cuda.get_device_properties = properties
    cuda.get_device_name = lambda device=None: properties(device).name
    cuda.mem_get_info = lambda device=None: allocator.free_and_total(index_of(device))
    cuda.memory.mem_get_info = cuda.mem_get_info
    cuda.memory_stats = _statistics
    cuda.memory_allocated = lambda device=None: allocator.active(index_of(device))
    cuda.max_memory_allocated = lambda device=None: allocator.peak(index_of(device))
    runtime = _runtime()
    cuda.cudart, cuda.stream, cuda.device = (lambda: runtime), _nothing, _nothing
    cuda.Stream, cuda.Event = Stream, Event
    cuda._initialized = True
    anything: Any = torch
    anything.Stream, anything.Generator = Stream, Generator
    anything.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()
    of_tensors: Any = torch.Tensor
    of_tensors.pin_memory = _pinned
    of_tensors.is_pinned = lambda self, device=None: False
    of_tensors.record_stream = lambda self, stream: None
    of_tensors.cuda = lambda self, device=None, **_: self.to(f"cuda:{index_of(device)}")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._host_emptyCache = lambda: None


def _put_into_threads() -> None:
    run = threading.Thread.run

    def under_modes(thread: threading.Thread) -> None:
        emulated_modes.enter()
        run(thread)

    threading.Thread.run = under_modes  # type: ignore[method-assign]
    emulated_modes.enter()


def _put_into_kernels() -> None:
    """Have comfy-kitchen, if it is installed, do without kernels that a driver would launch."""
    with contextlib.suppress(ImportError):
        import comfy_kitchen

        for name in ("cuda", "triton"):
            comfy_kitchen.registry.disable(name)


_put_into_torch()
_put_into_kernels()
emulated_exchanges.install()
_put_into_threads()
emulated_aimdo.install()
