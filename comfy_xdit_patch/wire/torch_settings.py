"""Read torch's settings that change what is computed, and set them as they are elsewhere.

Runs in: host (``current``) and worker (``follow``).

torch keeps them in one place, ``torch._C``, as pairs of ``_get_x`` and ``_set_x``; its Python side
(``torch.backends.*``, ``torch.set_*``) only calls these. They are asked directly, since the host
asks in every step: 3 microseconds for all of them. A pair that a version of torch does not have is
left out. Which kernel of equal results is taken (cuBLAS or cuBLASLt) is no part of it, nor is how
many threads compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.library

from comfy_xdit_patch.wire.tensors import dtype_of

Value: TypeAlias = Any
"""None for a setting that torch cannot tell, else a bool, int, str or a list of these."""
PAIRS = (
    "cpu_allow_fp16_reduced_precision_reduction",
    "cublas_allow_bf16_reduced_precision_reduction",
    "cublas_allow_fp16_accumulation",
    "cublas_allow_fp16_reduced_precision_reduction",
    "cublas_allow_tf32",
    "cudnn_allow_tf32",
    "cudnn_benchmark",
    "cudnn_deterministic",
    "cudnn_enabled",
    "deterministic_fill_uninitialized_memory",
    "math_sdp_allow_fp16_bf16_reduction",
    "float32_matmul_precision",
    "mkldnn_deterministic",
    "mkldnn_enabled",
    "nnpack_enabled",
    "onednn_allow_tf32",
    "sdp_priority_order",
)
SDP = ("cudnn", "flash", "math", "mem_efficient", "overrideable")
PRECISIONS = (
    *(("cuda", "matmul"), ("cuda", "conv")),
    *(("mkldnn", "matmul"), ("mkldnn", "conv")),
)
"""Of float32 by backend and operation, from torch 2.9. The settings above come first: each sets
several of these."""
AUTOCAST_DEVICES = ("cpu", "cuda")


def values() -> list[Value]:
    """Return this thread's settings, in the order of ``current``."""
    return [get() for get, _ in _rows().values()]


def current() -> dict[str, Value]:
    """Return this thread's settings by name."""
    return dict(zip(_rows(), values(), strict=True))


def follow(values: Mapping[str, Value]) -> None:
    """Set what differs."""
    for name, (get, put) in _rows().items():
        value = values.get(name)
        if value is not None and get() != value:
            put(value)


def modes() -> list[str]:
    """Return the classes of modes that change what every function of torch does in this thread.

    They come from ``with`` statements around the sampling. ``torch.set_default_device`` is one too
    and changes nothing here: ComfyUI names the device of all it makes.
    """
    of_functions, of_operators = torch._C._len_torch_function_stack, _num_dispatch_modes
    if not of_functions() and not of_operators():
        return []
    active = [torch._C._get_function_stack_at(index) for index in range(of_functions())]
    active += [torch._C._get_dispatch_stack_at(index) for index in range(of_operators())]
    names = [f"{type(mode).__module__}.{type(mode).__qualname__}" for mode in active]
    return [name for name in names if name != "torch.utils._device.DeviceContext"]


def num_kernels() -> int:
    """Return how many kernels Python code has put under operators, of torch or others."""
    return len(_kernels())


def own_kernels() -> frozenset[str]:
    """Return torch's own operators that Python code put another kernel under.

    Those of the device "Meta", which compute nothing, are torch's own.
    """
    return frozenset(
        key for key in _kernels() if key.startswith("aten/") and not key.endswith("/Meta")
    )


def _kernels() -> set[str]:
    return torch.library._impls


_num_dispatch_modes = torch._C._len_torch_dispatch_stack


@functools.cache
def _rows() -> dict[str, tuple[Callable[[], Value], Callable[[Value], None]]]:
    core: Any = torch._C
    rows: dict[str, tuple[Callable[[], Value], Callable[[Value], None]]] = {
        "default dtype": (_default_dtype, lambda name: torch.set_default_dtype(dtype_of(name))),
        "deterministic algorithms": (
            lambda: [core._get_deterministic_algorithms(), _warns_only()],
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
    }
    pairs = [(name, f"_get_{name}", f"_set_{name}") for name in PAIRS]
    pairs += [
        (f"{name} attention", f"_get_{name}_sdp_enabled", f"_set_sdp_use_{name}") for name in SDP
    ]
    for name, getter, setter in pairs:
        if hasattr(core, getter) and hasattr(core, setter):
            rows[name] = _pair(
                getattr(core, getter),
                getattr(core, setter),
                takes_several="reduction" in name and isinstance(getattr(core, getter)(), tuple),
            )
    if hasattr(core, "_get_fp32_precision_getter"):
        for which in PRECISIONS:
            rows[f"float32 of {' '.join(which)}"] = (
                functools.partial(core._get_fp32_precision_getter, *which),
                functools.partial(core._set_fp32_precision_setter, *which),
            )
    for device in AUTOCAST_DEVICES:
        rows[f"autocast on {device}"] = _autocast(device)
    return rows


def _pair(
    get: Callable[[], Any], put: Callable[..., None], *, takes_several: bool
) -> tuple[Callable[[], Value], Callable[[Value], None]]:
    def value() -> Value:
        try:
            found = get()
        except RuntimeError:  # set by torch's older and newer names: the newer ones tell
            return None
        return list(found) if isinstance(found, tuple) else found

    def setting(value: Value) -> None:
        if takes_several:
            put(*value)
        else:
            put(value)

    return value, setting


def _autocast(device: str) -> tuple[Callable[[], Value], Callable[[Value], None]]:
    def value() -> Value:
        if not torch.is_autocast_enabled(device):
            return [False, ""]
        return [True, str(torch.get_autocast_dtype(device))]

    def setting(value: Value) -> None:
        is_on, dtype = value
        if is_on:
            torch.set_autocast_dtype(device, dtype_of(dtype))
        torch.set_autocast_enabled(device, is_on)
        torch.clear_autocast_cache()

    return value, setting


def _default_dtype() -> str:
    return str(torch.get_default_dtype())


def _warns_only() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()
