"""Bodies about weights that ComfyUI with dynamic VRAM handles in ways of its own.

Runs in: a ComfyUI process of ``process.py``; what would lie on a card lies in CPU memory.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.memory_management as memory
import comfy.model_patcher
import comfy.ops
import torch
from comfy.weight_adapter import LoRAAdapter

from comfy_xdit_patch.wire.files import file_identity
from comfy_xdit_patch.wire.messages.requests import ModelSource
from comfy_xdit_patch.worker.weights.loading import load_patcher
from comfy_xdit_patch.worker.weights.placing import patches_computed_in

CPU = torch.device("cpu")
LAYER, RANK = "diffusion_model.0", 4


def uncast_by_a_worker(path: str, uncast: list[str]) -> dict[str, str]:
    """Load a file in fp8 as a worker does; return the dtype of every weight."""
    file, options = file_identity(path), {"dtype": "torch.float8_e4m3fn"}
    patcher = load_patcher(ModelSource("load_diffusion_model", path, options, file, uncast=uncast))
    weights = patcher.model.diffusion_model.named_parameters()
    return {name: str(weight.dtype) for name, weight in weights}


def patched_weights(stored: str) -> dict[str, Any]:
    """Patch one layer as a host with dynamic VRAM does, and as a worker does for such a host.

    Returns:
        How many elements of weight and bias differ: between the two, and between the first and
        ComfyUI's own way for a whole model.
    """
    generator = torch.Generator().manual_seed(3)
    dtype, compute = getattr(torch, stored), torch.bfloat16

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    weight, bias = (random(64, 48) / 8).to(dtype), (random(64) / 8).to(dtype)
    factors = random(64, RANK), random(RANK, 48) / 8, 3.0, None, None, None
    patches = {
        f"{LAYER}.weight": [(0.7, LoRAAdapter(set(), factors), 1.0, None, None)],
        f"{LAYER}.bias": [(0.7, (random(64) / 8,), 1.0, None, None)],
    }

    def layer() -> Any:
        made = comfy.ops.manual_cast.Linear(48, 64, dtype=dtype)
        tensors = {"weight": weight.clone(), "bias": bias.clone()}
        for name, tensor in tensors.items():
            setattr(made, name, torch.nn.Parameter(tensor, requires_grad=False))
        return made

    host, worker, whole = _at_first_use(layer(), patches, compute), layer(), layer()
    with patches_computed_in(compute):
        _patch_whole(worker, patches)
    _patch_whole(whole, patches)
    return {
        "worker": [_num_different(host, worker, name) for name in ("weight", "bias")],
        "whole": [_num_different(host, whole, name) for name in ("weight", "bias")],
    }


def _at_first_use(layer: Any, patches: dict[str, Any], compute: torch.dtype) -> Any:
    """Have ComfyUI bring a layer to the card and patch it there; what it keeps is the result."""
    for name in ("weight", "bias"):
        patch = comfy.model_patcher.LowVramPatch(f"{LAYER}.{name}", patches)
        setattr(layer, f"{name}_lowvram_function", patch)
    layer.seed_key = LAYER
    tensors = [layer.weight, layer.bias]
    on_card = torch.zeros(memory.vram_aligned_size(tensors), dtype=torch.uint8)
    for place, tensor in zip(
        memory.interpret_gathered_like(tensors, on_card), tensors, strict=True
    ):
        place.copy_(tensor)
    layer._prefetch = {
        "resident": False,
        "signature": object(),
        "xfer_dest": on_card,
        "needs_cast": False,
        "cast_geometry": memory.tensors_to_geometries(tensors),
    }
    comfy.ops.resolve_cast_module_with_vbar(layer, compute, CPU, compute, None, False)
    return SimpleNamespace(weight=layer._v_weight, bias=layer._v_bias)


def _patch_whole(layer: Any, patches: dict[str, Any]) -> None:
    model = torch.nn.Module()
    model.diffusion_model = torch.nn.Sequential(layer)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    patcher.patches = patches
    for key in patches:
        patcher.patch_weight_to_device(key, device_to=CPU)


def _num_different(one: Any, other: Any, name: str) -> int:
    a, b = (getattr(layer, name).to(torch.float32) for layer in (one, other))
    return int((a != b).sum())
