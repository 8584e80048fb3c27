"""Make the tensors of a tiny Lotus model (a Stable Diffusion UNet) and of a VAE for it.

Runs in: the rig's environment (torch; no ComfyUI).

A template lets Lotus estimate depth before FLUX paints. ComfyUI knows it by its 320 channels and
its 4 classes, so the UNet cannot be narrow; it is short instead: one level of one block.
"""

from __future__ import annotations

import torch

from rig import weights
from rig.weights import Maker, State

CHANNELS = 320
TIME_CHANNELS = 4 * CHANNELS
CONTEXT = 1024  # the template's node has Lotus' one prompt built in
CLASSES = 4
LATENT_CHANNELS = 4
VAE_SCALE = 0.18215


def lotus(*, seed: int) -> State:
    """Make a UNet of one level."""
    make, state = Maker(seed), State()
    for name, columns in {"time_embed": CHANNELS, "label_emb.0": CLASSES}.items():
        make.linear(state, f"{name}.0", columns, TIME_CHANNELS, gain=1.4)
        make.linear(state, f"{name}.2", TIME_CHANNELS, TIME_CHANNELS, gain=1.4)
    _conv(make, state, "input_blocks.0.0", LATENT_CHANNELS, CHANNELS)
    _residual(make, state, "input_blocks.1.0", CHANNELS)
    _transformer(make, state, "input_blocks.1.1")
    _residual(make, state, "middle_block.0", CHANNELS)
    _transformer(make, state, "middle_block.1")
    _residual(make, state, "middle_block.2", CHANNELS)
    for number in range(2):
        _residual(make, state, f"output_blocks.{number}.0", 2 * CHANNELS)
    _norm(state, "out.0", CHANNELS)
    _conv(make, state, "out.2", CHANNELS, LATENT_CHANNELS)
    return state


def vae(*, seed: int) -> State:
    """Make Stable Diffusion's VAE in the TAESD layout: fewer channels of the latent."""
    state = weights.vae(seed=seed)
    for part in ("weight", "bias"):
        layer = f"taesd_encoder.14.{part}"
        state[layer] = state[layer][:LATENT_CHANNELS]
    state["taesd_decoder.1.weight"] = 2 * state["taesd_decoder.1.weight"][:, :LATENT_CHANNELS]
    return state | {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(0.0)}


def _residual(make: Maker, state: State, name: str, read: int) -> None:
    _norm(state, f"{name}.in_layers.0", read)
    _conv(make, state, f"{name}.in_layers.2", read, CHANNELS, gain=1.4)
    make.linear(state, f"{name}.emb_layers.1", TIME_CHANNELS, CHANNELS)
    _norm(state, f"{name}.out_layers.0", CHANNELS)
    _conv(make, state, f"{name}.out_layers.3", CHANNELS, CHANNELS, gain=1.4)
    if read != CHANNELS:
        _conv(make, state, f"{name}.skip_connection", read, CHANNELS, size=1)


def _transformer(make: Maker, state: State, name: str) -> None:
    _norm(state, f"{name}.norm", CHANNELS)
    make.linear(state, f"{name}.proj_in", CHANNELS, CHANNELS)
    block = f"{name}.transformer_blocks.0"
    for attention, columns in {"attn1": CHANNELS, "attn2": CONTEXT}.items():
        for part, read in (("to_q", CHANNELS), ("to_k", columns), ("to_v", columns)):
            weight = make.normal(CHANNELS, read, std=read**-0.5)
            state[f"{block}.{attention}.{part}.weight"] = weight
        make.linear(state, f"{block}.{attention}.to_out.0", CHANNELS, CHANNELS)
    make.linear(state, f"{block}.ff.net.0.proj", CHANNELS, 8 * CHANNELS)
    make.linear(state, f"{block}.ff.net.2", 4 * CHANNELS, CHANNELS)
    for norm in ("norm1", "norm2", "norm3"):
        _norm(state, f"{block}.{norm}", CHANNELS)
    make.linear(state, f"{name}.proj_out", CHANNELS, CHANNELS)


def _conv(
    make: Maker,
    state: State,
    name: str,
    read: int,
    written: int,
    *,
    size: int = 3,
    gain: float = 1.0,
) -> None:
    std = gain * (read * size**2) ** -0.5
    state[f"{name}.weight"] = make.normal(written, read, size, size, std=std)
    state[f"{name}.bias"] = make.normal(written, std=0.05)


def _norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(width), torch.zeros(width)
