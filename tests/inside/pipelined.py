"""Bodies that make the calls of a sampling run one by one, as a sampler does.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import sys
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from forwards import NODE_OPTIONS, inputs, node_options, patcher_of, status
from sharding import weight_patches

Call = dict[str, Any]


def _host() -> Any:
    activation = sys.modules.get("comfy_xdit_patch.host.guest.activation")
    return None if activation is None else activation.ACTIVATION.host


def use_pipeline(num_patches: int | None = None, warm_up: int = 1) -> None:
    """Cut calls into so many patches; make so many exact calls at first."""
    pipelines = _host().pipelines
    pipelines.num_patches, pipelines.num_warm_up_calls = num_patches, warm_up


def run(
    path: str,
    out: str,
    calls: list[Call],
    options: dict[str, Any] | None = None,
    *,
    lora: bool = False,
    **sizes: Any,
) -> dict[str, Any]:
    """Make calls within one sampling run, and save all outputs.

    Args:
        lora: patch every matrix of the blocks.
        calls: each may have ``sigma``; ``noise``: how much of a second noise the latent has;
            ``cond``: which prompt and stream; ``sizes`` of this call; ``falls_back``.
    """
    patcher = patcher_of(path, **(options or {}))
    if lora:
        patcher = patcher.clone()
        patcher.add_patches(weight_patches(patcher.model.diffusion_model), 0.7)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    base, host = patcher.model, _host()
    schedule = torch.linspace(1.0, 0.0, 11)
    current = None if host is None else host.begin_run(patcher)
    token = None if host is None else host.current_run.set(current)
    outputs, warm_ups = [], []
    try:
        for call in calls:
            cond = call.get("cond", 0)
            arguments = inputs(base, **{**sizes, **call.get("sizes", {})}, seed=cond)
            shape = arguments["x"].shape
            first, second = (
                torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)
            )
            sigma = torch.full((shape[0],), call.get("sigma", 0.8))
            arguments |= {"x": first + call.get("noise", 0.0) * second, "t": sigma}
            if call.get("prompt"):
                arguments["c_crossattn"] = arguments["c_crossattn"].flip(-1)
            transformer_options = {
                "sample_sigmas": schedule,
                "sigmas": sigma,
                "cond_or_uncond": [call.get("stream", cond)],
                "uuids": [f"cond {call.get('stream', cond)}"],
                **call.get("transformer_options", {}),
            }
            with torch.inference_mode():
                result = base.apply_model(**arguments, transformer_options=transformer_options)
            outputs.append(result)
            warm_ups.append(0 if current is None else current.counts.warm_ups)
    finally:
        if host is not None:
            host.current_run.reset(token)
            host.end_run(current)
        if lora:
            patcher.detach()
    torch.save(outputs, out)
    counted = zip([0, *warm_ups], warm_ups, strict=False)
    return {"status": status(), "exact": [now > before for before, now in counted]}


def lone(path: str, sigmas: int = 11, **case: Any) -> None:
    """Make one call with this many sigmas in the run, none for 0, and a node's patches."""
    patcher = patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    transformer_options = node_options(
        **{name: case.pop(name) for name in list(case) if name in NODE_OPTIONS}
    )
    if sigmas:
        transformer_options["sample_sigmas"] = torch.linspace(1.0, 0.0, sigmas)
    with torch.inference_mode():
        patcher.model.apply_model(
            **inputs(patcher.model, **case), transformer_options=transformer_options
        )


def image(
    path: str, out: str, vae: str, sampler: str, steps: int, size: int, seed: int = 5
) -> dict[str, Any]:
    """Sample an image with one of ComfyUI's samplers; save its latent and its pixels."""
    patcher = patcher_of(path)
    generator = torch.Generator().manual_seed(seed)
    params = patcher.model.diffusion_model.params
    context = torch.randn(1, 77, params.context_in_dim, generator=generator)
    pooled = torch.randn(1, params.vec_in_dim, generator=generator)
    cond = [[context, {"pooled_output": pooled, "guidance": 3.5}]]
    empty = torch.zeros(1, 16, size // 8, size // 8)
    latent = comfy.sample.sample(
        patcher,
        comfy.sample.prepare_noise(empty, seed),
        steps,
        1.0,
        sampler,
        "simple",
        cond,
        cond,
        empty,
        disable_pbar=True,
        seed=seed,
    )
    if vae not in _vaes:
        _vaes[vae] = comfy.sd.VAE(sd=comfy.utils.load_torch_file(vae))
    torch.save((latent, _vaes[vae].decode(latent)[0]), out)
    return status()


_vaes: dict[str, Any] = {}
