"""Bodies that compare a forward with shared modulation with the same forward before.

Runs in: a ComfyUI process of ``process.py``; one process for each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
import torch.distributed as dist
from forwards import inputs
from sharding import baking, gloo, loaded, magnitude, weight_patches, whole_bytes

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.worker.weights.shared_modulation import SharedModulation

SIZES = {"height": 10, "width": 13, "text_tokens": 77}
NUM_ROWS = 5
"""Of the whole batch, where it is shared: no number of ranks that is tested divides it."""


def apply(patcher: Any, *, rows: int, seed: int) -> torch.Tensor:
    """Run one forward as the samplers do."""
    given = inputs(patcher.model, **SIZES, batch=rows, seed=seed)
    with torch.inference_mode():
        out: torch.Tensor = patcher.model.apply_model(**given)
    return out


def compare(
    path: str,
    store: str,
    rank: int,
    world_size: int,
    options: dict[str, str],
    lora: bool = False,
    bypass: bool = False,
) -> dict[str, Any]:
    """Forward whole, share the modulation, forward again in several ways, and whole once more.

    Every rank computes all tokens, so that nothing but the modulation can differ.

    Args:
        bypass: a LoRA lies around the linears of the modulation, as ComfyUI's bypass hooks do.
    """
    patcher = loaded(path, options)
    if lora:
        patcher.add_patches(weight_patches(patcher.model.diffusion_model), 0.7)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    plans = {
        "alone": (ParallelPlan(ulysses=world_size), 1),
        "a batch of all": (ParallelPlan(ulysses=world_size), 3),
        "batch": (ParallelPlan(batch=world_size), NUM_ROWS),
    }
    if world_size == 4:
        plans["batch and sequence"] = ParallelPlan(batch=2, ulysses=2), NUM_ROWS
    calls = {
        # Ranks of one part of the batch have the same rows, and others have others.
        name: {"rows": end - first, "seed": plan.batch_index(rank)}
        for name, (plan, num_rows) in plans.items()
        for first, end in (plan.batch_rows(rank, num_rows),)
    }
    with bypassed(patcher, bypass):
        expected = {name: apply(patcher, **call) for name, call in calls.items()}
    if lora:
        patcher.detach()  # takes the weight patches out: ``bake`` is to put them in
    flux = patcher.model.diffusion_model
    before = dict(flux.named_parameters())
    whole = sum(map(whole_bytes, before.values()))
    equal = {}
    with gloo(store, rank, world_size):
        shared = SharedModulation(
            flux,
            group=dist.group.WORLD,
            index=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            bake=baking(patcher) if lora else lambda _, weight: weight,
        )
        held = sum(map(whole_bytes, flux.parameters()))
        with bypassed(patcher, bypass):
            for name, (plan, num_rows) in plans.items():
                for is_driven in (False, True):
                    shared.begin(plan, num_rows=num_rows, is_driven=is_driven)
                    found = apply(patcher, **calls[name])
                    equal[f"{name}, {is_driven}"] = torch.equal(found, expected[name])
            shared.begin(plans["alone"][0], num_rows=1, is_driven=False)
            sent = shared.bytes_sent
            apply(patcher, **calls["alone"])
            sent = shared.bytes_sent - sent
            # Another time step in the same call: a sampler's forward that asks twice.
            again = apply(patcher, rows=1, seed=9)
        shared.release()
        for name, parameter in before.items():
            owner, _, last = name.rpartition(".")
            flux.get_submodule(owner)._parameters[last] = parameter
    if lora:
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    with bypassed(patcher, bypass):
        equal["another row"] = torch.equal(again, apply(patcher, rows=1, seed=9))
        equal["restored"] = torch.equal(apply(patcher, **calls["alone"]), expected["alone"])
    modulation = sum(whole_bytes(p) for name, p in before.items() if is_shared(name))
    return {
        "equal": equal,
        "size": magnitude(expected),
        "held": held,
        "whole": whole,
        "modulation": modulation,
        "sent": sent,
    }


def is_shared(name: str) -> bool:
    """Whether a parameter is one of those that modulate blocks."""
    return "_blocks." in name and any(
        part in name for part in ("img_mod.lin.", "txt_mod.lin.", "modulation.lin.")
    )


@contextmanager
def bypassed(patcher: Any, is_there: bool) -> Iterator[None]:
    """Hang ComfyUI's bypass hooks on the linears of every block's modulation, while this lasts."""
    hooks = []
    if is_there:
        from comfy.weight_adapter.bypass import BypassForwardHook
        from comfy.weight_adapter.lora import LoRAAdapter

        generator = torch.Generator().manual_seed(5)
        for name, module in patcher.model.diffusion_model.named_modules():
            if not is_shared(f"{name}."):
                continue
            out, width = module.out_features, module.in_features
            up, down = (
                torch.randn(shape, generator=generator) * 0.05 for shape in ((out, 4), (4, width))
            )
            adapter = LoRAAdapter(set(), (up, down, 4.0, None, None, None))
            hooks.append(BypassForwardHook(module, adapter, multiplier=0.8))
            hooks[-1].inject()
    try:
        yield
    finally:
        for hook in reversed(hooks):
            hook.eject()
