"""Bodies about ComfyUI's own copy of a model that the workers run.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import forwards
import host_checks
import torch


def _with_lora(path: str) -> Any:
    patcher = forwards.patcher_of(path).clone()
    shape = patcher.model.diffusion_model.single_blocks[0].linear2.weight.shape
    generator = torch.Generator().manual_seed(5)
    patch = ("diff", (torch.randn(shape, generator=generator) * 0.02,))
    patcher.add_patches({"diffusion_model.single_blocks.0.linear2.weight": patch}, 1.0)
    return patcher


def lora_call(path: str, out: str) -> dict[str, Any]:
    """One call of a model with a weight patch."""
    patcher = _with_lora(path)
    try:
        return host_checks._call(path, out, patcher)
    finally:
        patcher.detach()


def held_back_calls(path: str, out: str, alone: str) -> dict[str, Any]:
    """The same with ComfyUI's copy held back, as on a GPU: by the workers, then by ComfyUI alone.

    CPU ranks hold nothing back by themselves; here ComfyUI's device is said to be a shared GPU.
    """
    memory = host_checks._activation().host.memory
    patcher = _with_lora(path)
    comfy.model_management.unload_all_models()
    memory.shares_gpu = lambda device: True
    try:
        result = {"parallel": host_checks._call(path, out, patcher)}
        result["held back"] = bool(patcher.model.model_lowvram)
        result["baked"] = len(patcher.backup)
        result["alone"] = host_checks._call(path, alone, patcher, multigpu_thread_device="cpu")
        comfy.model_management.load_models_gpu([patcher])
        result["held back after that"] = bool(patcher.model.model_lowvram)
        return result
    finally:
        del memory.shares_gpu
        patcher.detach()
        # The next test finds a model that was parallel last.
        host_checks._call(path, f"{out}.plain")
