"""Bodies that write small models of the whole FLUX family, in the names of this ComfyUI.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.chroma_radiance.model
import comfy.ldm.flux.model
import comfy.ops
import torch
from safetensors.torch import save_file

FLUX1 = {
    "out_channels": 16,
    "vec_in_dim": 768,
    "mlp_ratio": 4.0,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
FAMILIES = {
    "dev": FLUX1 | {"in_channels": 16, "guidance_embed": True},
    "schnell": FLUX1 | {"in_channels": 16, "guidance_embed": False},
    "fill": FLUX1 | {"in_channels": 96, "guidance_embed": True},
    "flux2": {
        "in_channels": 128,
        "out_channels": 128,
        "vec_in_dim": None,
        "mlp_ratio": 3.0,
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "patch_size": 1,
        "qkv_bias": False,
        "ops_bias": False,
        "global_modulation": True,
        "mlp_silu_act": True,
        "guidance_embed": True,
    },
}
# Ovis-Image, on which before 0.33 ComfyUI has no class.
if "yak_mlp" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
    FAMILIES["ovis"] = FLUX1 | {
        "in_channels": 16,
        "vec_in_dim": None,
        "guidance_embed": False,
        "yak_mlp": True,
        "txt_norm": True,
    }
CHROMA = {
    "context_in_dim": 64,
    "mlp_ratio": 4.0,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "in_dim": 64,
    "n_layers": 2,
}
RADIANCE = {
    "patch_size": 16,
    "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 4,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 32,
    "nerf_embedder_dtype": torch.float32,
}


def write_model(
    path: str, family: str, hidden: int, double: int, single: int, context: int
) -> None:
    """Write a model with seeded random weights that keep the variance of what they read."""
    model = chroma if "chroma" in family else flux
    state = {}
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model(family, hidden, double, single, context).state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim in (2, 4):
            state[name] = noise * parameter[0].numel() ** -0.5
        else:
            state[name] = 1.5 + 0.1 * noise if "norm" in name else 0.3 * noise
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in state.items()}, path)


def flux(
    family: str,
    hidden: int,
    double: int,
    single: int,
    context: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    operations: Any = comfy.ops.disable_weight_init,
) -> torch.nn.Module:
    parameters = dict(FAMILIES[family])
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
        parameters["txt_ids_dims"] = [3] if family == "flux2" else []
    return comfy.ldm.flux.model.Flux(
        dtype=dtype,
        device=device,
        operations=operations,
        hidden_size=hidden,
        num_heads=hidden // 128,
        depth=double,
        depth_single_blocks=single,
        context_in_dim=context,
        **parameters,
    )


def chroma(family: str, hidden: int, double: int, single: int, context: int) -> torch.nn.Module:
    """Chroma, or Chroma Radiance with one of its two heads."""
    parameters = CHROMA | {"context_in_dim": context, "hidden_dim": hidden // 2, "out_dim": hidden}
    parameters |= {"hidden_size": hidden, "num_heads": hidden // 128}
    parameters |= {"depth": double, "depth_single_blocks": single}
    if "txt_ids_dims" in comfy.ldm.chroma.model.ChromaParams.__dataclass_fields__:
        parameters |= {"txt_ids_dims": [], "vec_in_dim": None}
    common = {"dtype": torch.float32, "device": "cpu"}
    common["operations"] = comfy.ops.disable_weight_init
    if family == "chroma":
        parameters |= {"in_channels": 64, "out_channels": 64, "patch_size": 2}
        return comfy.ldm.chroma.model.Chroma(**parameters, **common)
    parameters |= RADIANCE | {"in_channels": 3, "out_channels": 3}
    parameters["nerf_final_head_type"] = family.removeprefix("chroma_radiance_")
    known = comfy.ldm.chroma_radiance.model.ChromaRadianceParams.__dataclass_fields__
    for name in ("use_x0", "use_sequential_txt_ids"):
        if name in known:
            parameters[name] = family.endswith("conv")  # x0: sizes in whole patches only
    return comfy.ldm.chroma_radiance.model.ChromaRadiance(**parameters, **common)
