"""Bodies that call FLUX's forward as ComfyUI's samplers do.

Runs in: a ComfyUI process of ``process.py``; torch and ComfyUI are imported there.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sd
import torch

_patchers: dict[str, Any] = {}


def patcher_of(path: str, **model_options: Any) -> Any:
    """Load a diffusion model once, as UNETLoader does."""
    key = f"{path} {sorted(model_options)}"
    if key not in _patchers:
        options = {
            name: getattr(torch, value) if name == "dtype" else value
            for name, value in model_options.items()
        }
        _patchers[key] = comfy.sd.load_diffusion_model(path, model_options=options)
    return _patchers[key]


def inputs(
    base: Any,
    *,
    height: int,
    width: int,
    batch: int,
    text_tokens: int,
    refs: list[list[int]] = (),  # type: ignore[assignment]
    ref_method: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Make random arguments of ``BaseModel.apply_model``; sizes of latents, not pixels."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    flux = base.diffusion_model
    channels = flux.params.in_channels
    arguments: dict[str, Any] = {
        "x": noise(batch, channels, height, width),
        "t": torch.linspace(0.9, 0.4, batch),
        "c_crossattn": noise(batch, text_tokens, flux.params.context_in_dim),
    }
    if flux.params.vec_in_dim is not None:
        arguments["y"] = noise(batch, flux.params.vec_in_dim)
    if flux.params.guidance_embed:
        arguments["guidance"] = torch.full((batch,), 3.5)
    if refs:
        arguments["ref_latents"] = [noise(batch, channels, h, w) for h, w in refs]
    if ref_method is not None:
        arguments["ref_latents_method"] = ref_method
    return arguments


def forward(path: str, out: str, calls: int = 1, **sizes: Any) -> dict[str, Any]:
    """Run one forward (``calls`` times) and save the last output."""
    patcher = patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    base = patcher.model
    arguments = inputs(base, **sizes)
    with torch.inference_mode():
        for _ in range(calls):
            result = base.apply_model(**arguments, transformer_options={})
    torch.save(result, out)
    return status()


def status() -> dict[str, Any]:
    """Our status object, or an empty one where our package is switched off."""
    import sys

    activation = sys.modules.get("comfy_xdit_patch.activation")
    return activation.ACTIVATION.status() if activation is not None else {}
