"""Bring a model's weights in use to where its residency plan has them.

Runs in: worker process.

    full      ComfyUI loads and patches the model completely
    offload   ComfyUI loads what fits, and keeps the rest in CPU memory
    sharded   each block's weights are patched whole, one at a time, and then cut
    tensor    the same; each rank's part is the heads and columns that it computes
    modulation    the same; only what modulates the blocks is cut
    cast      the same; what ComfyUI would cast for each call is cast before
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.wire.casts import can_cast_once
from comfy_xdit_patch.wire.fingerprint import PREFIX
from comfy_xdit_patch.wire.tensors import digest_weight
from comfy_xdit_patch.worker.weights.sharded_blocks import Bake, ShardedBlocks
from comfy_xdit_patch.worker.weights.shared_modulation import SharedModulation
from comfy_xdit_patch.worker.weights.tensor_blocks import TensorBlocks

Shared = TypeVar("Shared", ShardedBlocks, SharedModulation)

Progress = Callable[[float], None]
"""Called with the part of a load that is done, 0 to 1."""


def place_whole(patcher: Any, *, is_complete: bool, progress: Progress) -> None:
    """Have ComfyUI's memory manager load and patch a model.

    Args:
        is_complete: all of it on the device, whatever ComfyUI would decide, unless the user
            started ComfyUI with --lowvram or --novram.
    """
    import comfy.model_management as management

    wants_little = management.vram_state in (
        management.VRAMState.LOW_VRAM,
        management.VRAMState.NO_VRAM,
    )
    total = sum(1 for _ in patcher.model.parameters())
    # ComfyUI calls it for every weight that it loads, patched or not.
    with calls_counted(patcher, "patch_weight_to_device", total, progress):
        management.load_models_gpu([patcher], force_full_load=is_complete and not wants_little)


@contextmanager
def calls_counted(patcher: Any, method: str, total: int, progress: Progress) -> Iterator[None]:
    """Report each call of a ModelPatcher's method as one part of a whole while this lasts."""
    done = 0
    original = getattr(patcher, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        progress(done / total)
        return original(*args, **kwargs)

    setattr(patcher, method, counted)
    try:
        yield
    finally:
        delattr(patcher, method)


@contextmanager
def patches_computed_in(dtype: torch.dtype | None) -> Iterator[None]:
    """While this lasts, weights are patched as by a host with dynamic VRAM.

    ComfyUI with dynamic VRAM patches a weight when its layer first needs it, in the layer's dtype
    and with the layer's name as the seed (comfy/ops.py, ``resolve_cast_module_with_vbar``). Where
    it places a whole model, it patches in a dtype of the device, and the weight's name is the seed.

    Args:
        dtype: the layers'; None leaves ComfyUI's own.
    """
    if dtype is None:
        yield
        return
    import comfy.lora
    import comfy.model_management
    import comfy.utils

    calculate, seed_of = comfy.lora.calculate_weight, comfy.utils.string_to_seed

    def calculate_weight(patches: Any, weight: Any, key: str, **options: Any) -> Any:
        return calculate(patches, weight, key, **{"intermediate_dtype": dtype, **options})

    replaced = [
        (comfy.lora, "calculate_weight", calculate_weight),
        (comfy.model_management, "lora_compute_dtype", lambda device: dtype),
        (comfy.utils, "string_to_seed", lambda key: seed_of(key.rpartition(".")[0])),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def place_shared(
    patcher: Any,
    kind: type[Shared],
    *,
    group: dist.ProcessGroup,
    index: int,
    world_size: int,
    digests: dict[str, str] | None,
    progress: Progress,
    is_cast: bool = False,
) -> Shared:
    """Patch a model's weights and keep this rank's part of those that all ranks share.

    ComfyUI's own ``patch_weight_to_device`` bakes each weight, so the bits are those of a whole
    load; at no time is more than one block whole.

    Args:
        kind: what is shared: the blocks, or what modulates them.
        group: all ranks.
        digests: filled with a digest of every weight in use, before casts, if they are asked for.
        is_cast: what ComfyUI casts for each call is cast now (``wire/casts.py``).
    """
    return kind(
        patcher.model.diffusion_model,
        group=group,
        index=index,
        world_size=world_size,
        device=patcher.load_device,
        bake=_place_outside_of_blocks(patcher, digests, progress, is_cast=is_cast),
    )


def place_tensor(
    patcher: Any,
    *,
    index: int,
    degree: int,
    digests: dict[str, str] | None,
    progress: Progress,
) -> TensorBlocks:
    """The same, with the blocks cut by heads and columns; at no time is more than one weight whole.

    Args:
        index: this rank's place among ``degree`` ranks.
    """
    return TensorBlocks(
        patcher.model.diffusion_model,
        index=index,
        degree=degree,
        device=patcher.load_device,
        bake=_place_outside_of_blocks(patcher, digests, progress),
    )


def _place_outside_of_blocks(
    patcher: Any, digests: dict[str, str] | None, progress: Progress, *, is_cast: bool = False
) -> Bake:
    """Put what is in no block on the device; return what bakes the blocks' weights."""
    import comfy.utils

    model, device = patcher.model, patcher.load_device
    flux = model.diffusion_model
    patcher.patch_model(load_weights=False)
    cast_dtype = model.manual_cast_dtype if is_cast else None
    total = sum(1 for _ in flux.parameters())
    done = 0

    def bake(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        progress(done / total)
        if PREFIX + name in patcher.patches:
            patcher.patch_weight_to_device(PREFIX + name, device_to=device)
            tensor = comfy.utils.get_attr(flux, name)
        if digests is not None:
            digests[name] = digest_weight(tensor)
        if cast_dtype is not None:
            owner = flux.get_submodule(name.rpartition(".")[0])
            if can_cast_once(owner, tensor, tensor.dtype):
                tensor = tensor.to(cast_dtype)
        return tensor

    for name, _ in list(flux.named_parameters()):
        if not name.startswith(BLOCK_LISTS):
            moved = comfy.utils.get_attr(flux, name).to(device)
            comfy.utils.set_attr_param(flux, name, bake(name, moved))
    if digests is not None:  # Chroma marks with empty buffers what its file was made for.
        digests.update((name, digest_weight(buffer)) for name, buffer in flux.named_buffers())
    if patcher.force_cast_weights:
        for module in flux.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = module.comfy_force_cast_weights = True
    model.current_weight_patches_uuid = patcher.patches_uuid
    model.device = device
    return bake
