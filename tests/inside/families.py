"""Bodies that write small models of the whole FLUX family, in the names of this ComfyUI.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

from pathlib import Path

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


def write_model(
    path: str, family: str, hidden: int, double: int, single: int, context: int
) -> None:
    """Write a model with seeded random weights that keep the variance of what they read."""
    parameters = dict(FAMILIES[family])
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
        parameters["txt_ids_dims"] = [3] if family == "flux2" else []
    flux = comfy.ldm.flux.model.Flux(
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
        hidden_size=hidden,
        num_heads=hidden // 128,
        depth=double,
        depth_single_blocks=single,
        context_in_dim=context,
        **parameters,
    )
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, parameter in flux.state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            state[name] = noise * parameter.shape[1] ** -0.5
        else:
            state[name] = 1.5 + 0.1 * noise if "norm" in name else 0.3 * noise
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in state.items()}, path)
