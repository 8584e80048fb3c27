"""Bodies that compare a forward with sharded weights with the same forward before.

Runs in: a ComfyUI process of ``process.py``; one process for each rank.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
import torch.distributed as dist
from forwards import inputs, reset_peak, resident
from safetensors.torch import load_file, save_file

from comfy_xdit_patch.worker.weights.sharded_blocks import ShardedBlocks

SIZES = {"height": 10, "width": 13, "batch": 1, "text_tokens": 77}
# Moved between versions.
string_to_seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
DEADLINE = datetime.timedelta(seconds=120)


def write_mixed_precision(source: str, path: str) -> None:
    """Write a model with every second linear layer of its blocks in scaled fp8."""
    state, layers = {}, {}
    for number, (name, tensor) in enumerate(load_file(source).items()):
        state[name] = tensor
        if "_blocks." in name and tensor.ndim == 2 and number % 2:
            layer = name.removesuffix(".weight")
            scale = tensor.abs().max().float() / 448
            state[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            state[f"{layer}.weight_scale"] = scale
            layers[layer] = {"format": "float8_e4m3fn"}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(state, path, metadata)


def loaded(path: str, options: dict[str, str]) -> Any:
    """Load a model as UNETLoader does, with weights that do not lie in the file's mapping."""
    model_options = {name: getattr(torch, value) for name, value in options.items()}
    return comfy.sd.load_diffusion_model(path, model_options=model_options)


@contextmanager
def gloo(store: str, rank: int, world_size: int) -> Iterator[dist.ProcessGroup]:
    """Join a world of gloo ranks for a while."""
    file_store = dist.FileStore(store, world_size)
    dist.init_process_group(
        "gloo", store=file_store, rank=rank, world_size=world_size, timeout=DEADLINE
    )
    group = dist.new_group(timeout=DEADLINE)
    assert group is not None
    try:
        yield group
    finally:
        dist.destroy_process_group()


def apply(patcher: Any, patches: dict[str, Any] | None = None, **sizes: int) -> torch.Tensor:
    """Run one forward as the samplers do."""
    with torch.inference_mode():
        out: torch.Tensor = patcher.model.apply_model(
            **inputs(patcher.model, **{**SIZES, **sizes}),
            transformer_options={"patches_replace": {"dit": patches or {}}},
        )
    return out


def skip_double(args: dict[str, Any], _: Any) -> dict[str, Any]:
    """Stand in for a double block: hand on what it would read."""
    return {"img": args["img"], "txt": args["txt"]}


def skip_single(args: dict[str, Any], _: Any) -> dict[str, Any]:
    """Stand in for a single block."""
    return {"img": args["img"]}


def broken(*_: Any) -> dict[str, Any]:
    raise RuntimeError("this block fails")


SKIPPED = {
    "none": {},
    "first": {("double_block", 0): skip_double},
    "middle": {("double_block", 1): skip_double, ("single_block", 0): skip_single},
    "last": {("single_block", 2): skip_single},
}


def compare(
    path: str, store: str, rank: int, world_size: int, options: dict[str, str], lora: bool = False
) -> dict[str, Any]:
    """Forward whole, shard, forward again in several ways, restore, forward once more."""
    patcher = loaded(path, options)
    if lora:
        patcher.add_patches(weight_patches(patcher.model.diffusion_model), 0.7)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    expected = {name: apply(patcher, patches) for name, patches in SKIPPED.items()}
    if lora:
        patcher.detach()  # takes the weight patches out: ``bake`` is to put them in
    flux = patcher.model.diffusion_model
    kinds = sorted({type(p).__name__ for p in flux.parameters()})
    dtypes = sorted({str(p.dtype) for p in flux.parameters()})
    before = {name: whole_bytes(p) for name, p in flux.named_parameters()}
    equal = {}
    with gloo(store, rank, world_size) as group:
        sharded = ShardedBlocks(
            flux,
            group=group,
            index=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            bake=baking(patcher) if lora else None,
        )
        assert all(p.numel() == 0 for n, p in flux.named_parameters() if "_blocks." in n)
        for name, patches in SKIPPED.items():
            equal[name] = torch.equal(apply(patcher, patches), expected[name])
        try:
            apply(patcher, {("double_block", 1): broken})
        except RuntimeError as error:
            equal["failed as it should"] = str(error) == "this block fails"
        assert all(p.numel() == 0 for n, p in flux.named_parameters() if "_blocks." in n)
        sharded.prefetch_first()
        gathered = sharded.bytes_gathered
        equal["after a failure"] = torch.equal(apply(patcher), expected["none"])
        result = {
            "gathered": sharded.bytes_gathered - gathered,
            "held": sharded.bytes_held,
            "window": sharded.bytes_window,
            "whole": sharded.bytes_whole,
            "outside": sum(n for name, n in before.items() if "_blocks." not in name),
            "first": sharded._units[0].shard.numel() * (world_size - 1),
        }
        sharded.release(restore=True)
    equal["restored"] = torch.equal(apply(patcher), expected["none"])
    return {**result, "equal": equal, "kinds": kinds, "dtypes": dtypes, "size": magnitude(expected)}


def whole_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a weight as it is stored: a wrapper's inner tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(whole_bytes(getattr(tensor, n)) for n in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def magnitude(outputs: dict[str, torch.Tensor]) -> list[float]:
    """Largest value of each output, each different from the others."""
    return [out.abs().max().item() for out in outputs.values()]


def weight_patches(flux: Any) -> dict[str, Any]:
    """Make a patch for every matrix of the blocks, as ComfyUI's loaders of LoRAs hand them over."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"diffusion_model.{name}": (
            "diff",
            (torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5,),
        )
        for name, p in flux.named_parameters()
        if "_blocks." in name and p.ndim == 2
    }


def baking(patcher: Any) -> Any:
    """Apply the patcher's weight patches as ``ModelPatcher.patch_weight_to_device`` does."""

    def bake(name: str, weight: torch.Tensor) -> torch.Tensor:
        key = f"diffusion_model.{name}"
        if key not in patcher.patches:
            return weight
        temporary = weight.to(torch.float32, copy=True)
        patched = comfy.lora.calculate_weight(patcher.patches[key], temporary, key)
        seed = string_to_seed(key)
        return comfy.float.stochastic_rounding(patched, weight.dtype, seed=seed)

    return bake


def cost(
    path: str, store: str, rank: int, world_size: int, options: dict[str, str], repeats: int = 3
) -> dict[str, Any]:
    """Measure time and memory of sharding, of the gathers, and of forwards with and without."""
    patcher = loaded(path, options)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    sizes = {"height": 32, "width": 32, "text_tokens": 256}
    with gloo(store, rank, world_size) as group:
        apply(patcher, **sizes)
        whole_s = min(timed(patcher, sizes) for _ in range(repeats))
        reset_peak()
        before, start = resident("VmRSS"), time.perf_counter()
        sharded = ShardedBlocks(
            patcher.model.diffusion_model,
            group=group,
            index=rank,
            world_size=world_size,
            device=torch.device("cpu"),
        )
        result = {
            "shard_s": time.perf_counter() - start,
            "shard_peak_mib": (resident("VmHWM") - before) >> 20,
            "shard_after_mib": (resident("VmRSS") - before) >> 20,
        }
        apply(patcher, **sizes)
        times = []
        for _ in range(repeats):
            sharded.wait_s = 0.0
            times.append((timed(patcher, sizes), sharded.wait_s))
        sharded_s, wait_s = min(times)
        result |= {"whole_s": whole_s, "sharded_s": sharded_s, "wait_s": wait_s}
        for name in ("bytes_held", "bytes_window", "bytes_whole"):
            result[name.replace("bytes", "mib")] = getattr(sharded, name) >> 20
        dist.barrier(group)
        sharded.release(restore=False)
    return {name: round(value, 3) for name, value in result.items()}


def timed(patcher: Any, sizes: dict[str, int]) -> float:
    """Time one forward that all ranks start together."""
    dist.barrier()
    start = time.perf_counter()
    apply(patcher, **sizes)
    return time.perf_counter() - start
