"""A pack that puts its own functions where we have put ours, and does not know of us.

Runs in: a ComfyUI process of a test server.

Plain functions, without ``functools.wraps``. One, as ComfyUI-MultiGPU does, is no wrapper but a
copy of what it knows of ComfyUI's function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.ldm.chroma.model
import comfy.ldm.chroma_radiance.model
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd

_counts: Counter[str] = Counter()


def counts() -> dict[str, int]:
    """How often each function was called."""
    return dict(_counts)


PLACES = (
    (comfy.ldm.flux.model.Flux, "forward"),
    (comfy.ldm.flux.model.Flux, "_forward"),
    (comfy.ldm.chroma.model.Chroma, "_forward"),
    (comfy.ldm.chroma_radiance.model.ChromaRadiance, "_forward"),
    (comfy.ldm.flux.controlnet.ControlNetFlux, "forward"),
    (comfy.controlnet, "load_controlnet"),
    (comfy.model_base.BaseModel, "apply_model"),
    (comfy.model_base.BaseModel, "_apply_model"),
    (comfy.samplers.CFGGuider, "outer_sample"),
    (comfy.samplers.CFGGuider, "sample"),
    (comfy.samplers, "sampling_function"),
    (comfy.sd, "load_diffusion_model"),
    (comfy.sd, "load_checkpoint_guess_config"),
    (comfy.model_management, "free_memory"),
    (comfy.model_management, "soft_empty_cache"),
    (comfy.model_patcher.ModelPatcher, "partially_load"),
)


def _around(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def neighbour(*args: Any, **kwargs: Any) -> Any:
        _counts[name] += 1
        return original(*args, **kwargs)

    return neighbour


for owner, attribute in PLACES:
    name = f"{owner.__name__.rpartition('.')[2]}.{attribute}"
    _counts[name] = 0
    setattr(owner, attribute, _around(name, getattr(owner, attribute)))

_load_models_gpu = comfy.model_management.load_models_gpu


def load_models_gpu(
    models: Any,
    memory_required: float = 0,
    force_patch_weights: bool = False,
    minimum_memory_required: float | None = None,
    force_full_load: bool = False,
) -> Any:
    """Stand in ComfyUI's place: make room first, in one's own way, then load."""
    _counts["load_models_gpu"] += 1
    for model in models:
        comfy.model_management.free_memory(1024, model.load_device)
    return _load_models_gpu(
        models, memory_required, force_patch_weights, minimum_memory_required, force_full_load
    )


comfy.model_management.load_models_gpu = load_models_gpu
