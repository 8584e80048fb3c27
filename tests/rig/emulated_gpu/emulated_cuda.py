"""Put emulated cards into this process: ``torch.cuda`` and process groups as with GPUs.

Runs in: every process of a rig server with emulated cards; the shim imports it at start.

    EMULATED_GPUS=2   how many          EMULATED_GIB=24   memory of each, counted in each process

Cards answer as Ada ones (8.9) do. NCCL is gloo on what the tensors are. Streams do nothing, and
an event notes the time. ``inference_mode`` is ``no_grad``: views of inference tensors cannot be
wrapped.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import types
import uuid
from collections.abc import Iterator
from typing import Any

import emulated_aimdo
import emulated_modes
import emulated_tensors as tensors
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

UUIDS = [
    f"GPU-00000000-0000-0000-0000-{number:012d}"
    for number in range(int(os.environ["EMULATED_GPUS"]))
]
_current = threading.local()


def visible() -> list[str]:
    """Cards that this process sees."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return UUIDS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    return [name if name in UUIDS else UUIDS[int(name)] for name in wanted]


VISIBLE = visible()


def index_of(device: Any = None) -> int:
    """Index of a device as torch's functions take it."""
    if device is None:
        return int(getattr(_current, "index", 0))
    return device if isinstance(device, int) else torch.device(device).index or 0


def properties(device: Any = None) -> types.SimpleNamespace:
    """What torch says of a card."""
    index = index_of(device)
    return types.SimpleNamespace(
        name="NVIDIA GeForce RTX 4090 (emulated)",
        total_memory=tensors.TOTAL_BYTES,
        major=8,
        minor=9,
        multi_processor_count=128,
        uuid=uuid.UUID(VISIBLE[index].removeprefix("GPU-")),
        is_integrated=0,
        gcnArchName="",
        pci_domain_id=0,
        pci_bus_id=index + 1,
        pci_device_id=0,
        L2_cache_size=72 << 20,
        warp_size=32,
    )


class Event:
    """Notes when it was recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


class Stream:
    """Everything has been done when a call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.cuda_stream = torch.device(device or "cuda:0"), 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _nothing(_: Any) -> Iterator[None]:
    yield


def _set_device(device: Any) -> None:
    _current.index = index_of(device)


def _memory(device: Any = None) -> tuple[int, int]:
    used = tensors.alive.get(index_of(device), 0)
    return max(0, tensors.TOTAL_BYTES - used), tensors.TOTAL_BYTES


def _allocated(device: Any = None) -> int:
    return tensors.alive.get(index_of(device), 0)


def _statistics(device: Any = None) -> dict[str, int]:
    names = ("active_bytes.all.current", "reserved_bytes.all.current")
    return dict.fromkeys(names, _allocated(device))


def _runtime() -> types.SimpleNamespace:
    names = ("cudaHostRegister", "cudaHostUnregister", "cudaGetLastError")
    return types.SimpleNamespace(**dict.fromkeys(names, lambda *_: 0))


def _put_into_torch() -> None:
    cuda: Any = torch.cuda
    answers = {
        "is_available": len(VISIBLE) > 0,
        "device_count": len(VISIBLE),
        "get_device_capability": (8, 9),
        "is_bf16_supported": True,
        "can_device_access_peer": False,
        "get_allocator_backend": "native",
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    silent = ("synchronize", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all")
    for name in (*silent, "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    stream = Stream()
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.current_device, cuda.set_device = index_of, _set_device
    cuda.get_device_properties = properties
    cuda.get_device_name = lambda device=None: properties(device).name
    cuda.mem_get_info = cuda.memory.mem_get_info = _memory
    cuda.memory_stats, cuda.memory_allocated = _statistics, _allocated
    cuda.max_memory_allocated = lambda device=None: tensors.peak.get(index_of(device), 0)
    cuda.cudart, cuda.stream, cuda.device = _runtime, _nothing, _nothing
    cuda.Stream, cuda.Event = Stream, Event
    cuda._initialized = True
    anything: Any = torch
    anything.Stream = Stream
    anything.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()
    of_tensors: Any = torch.Tensor
    of_tensors.pin_memory = lambda self, device=None: self
    of_tensors.is_pinned = lambda self, device=None: False
    of_tensors.record_stream = lambda self, stream: None
    of_tensors.cuda = lambda self, device=None, **_: self.to(f"cuda:{index_of(device)}")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._ensureCUDADeviceGuardSet()


def _put_into_groups() -> None:
    begin, new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        return begin("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def group(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return new_group(*args, **kwargs)

    for module in (dist, c10d):
        module.init_process_group, module.new_group = init_process_group, group  # type: ignore[attr-defined]


def _put_into_threads() -> None:
    run = threading.Thread.run

    def under_modes(thread: threading.Thread) -> None:
        emulated_modes.enter()
        run(thread)

    threading.Thread.run = under_modes  # type: ignore[method-assign]
    emulated_modes.enter()


_put_into_torch()
_put_into_groups()
_put_into_threads()
emulated_aimdo.install()
