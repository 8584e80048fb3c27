"""A node pack that replaces how ComfyUI loads models, when it is imported.

Runs in: a ComfyUI process of a test server.

ComfyUI-MultiGPU does so: functions of ``model_management`` are replaced and not called any more.
"""

from __future__ import annotations

import gc
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


mm.get_torch_device = get_torch_device
mm.soft_empty_cache = soft_empty_cache
mm.load_models_gpu = load_models_gpu

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
