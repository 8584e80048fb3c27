"""A node pack that replaces how ComfyUI loads models, when it is imported.

Runs in: a ComfyUI process of a test server.

ComfyUI-MultiGPU does so: functions of ``model_management`` are replaced and not called any more,
the stream that a device has and the export of a tensor's memory are wrapped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher

mm = comfy.model_management
ORIGINAL_DEVICE = mm.get_torch_device()
ORIGINAL_LOAD = mm.load_models_gpu


def get_torch_device() -> Any:
    return ORIGINAL_DEVICE


def soft_empty_cache(*_: Any, **__: Any) -> None:
    gc.collect()


def load_models_gpu(models: Any, *args: Any, **kwargs: Any) -> None:
    """Load every model whole, whatever ComfyUI would have decided."""
    kwargs["force_full_load"] = True
    ORIGINAL_LOAD(models, *args, **kwargs)


def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return guarded


try:
    import comfy_kitchen.backends.cuda as kernels
except ImportError:  # ComfyUI 0.3.75 does without
    kernels = None
if hasattr(kernels, "_wrap_for_dlpack"):
    kernels._wrap_for_dlpack = wrapped(kernels._wrap_for_dlpack)
if hasattr(mm, "current_stream"):
    mm.current_stream = wrapped(mm.current_stream)
mm.get_torch_device = get_torch_device
mm.soft_empty_cache = soft_empty_cache
mm.load_models_gpu = load_models_gpu

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
