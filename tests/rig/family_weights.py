"""Make the tensors of tiny FLUX.2, Chroma, Chroma Radiance and Ovis-Image models.

Runs in: the rig's environment (torch; no ComfyUI).

The rules of ``weights.py`` hold here too: variance is kept, attention is selective, every gate is
open.
"""

from __future__ import annotations

import torch

from rig.weights import PATCH_COLUMNS, TIME_WIDTH, Maker, State

FLUX2_CHANNELS = 128
FLUX2_MLP = 3  # of the hidden width; the first layer writes it twice, as gate and value
GATED_GAIN = 2.5  # silu(a) * b has a standard deviation of about 0.4
APPROXIMATOR_WIDTH = 128
APPROXIMATOR_LAYERS = 5
APPROXIMATOR_INPUTS = 64
RADIANCE_PATCH = 16
NERF_WIDTH = 16
NERF_MLP = 4
NERF_BLOCKS = 2
NERF_FREQUENCIES = 8
RGB = 3


class FamilyMaker(Maker):
    """Draw layers that FLUX.1 does not have."""

    def matrix(self, state: State, name: str, columns: int, rows: int, gain: float = 1.0) -> None:
        """Add a linear layer without a bias."""
        state[f"{name}.weight"] = self.normal(rows, columns, std=gain * columns**-0.5)

    def gated_mlp(self, state: State, name: str, hidden: int, width: int) -> None:
        """Add Ovis-Image's feed-forward layers."""
        for part in ("gate_proj", "up_proj"):
            self.linear(state, f"{name}.{part}", hidden, width)
        self.linear(state, f"{name}.down_proj", width, hidden, gain=GATED_GAIN)

    def approximator(self, state: State, hidden: int) -> None:
        """Add Chroma's source of all modulation: one vector for each shift, scale and gate."""
        name, width = "distilled_guidance_layer", APPROXIMATOR_WIDTH
        self.linear(state, f"{name}.in_proj", APPROXIMATOR_INPUTS, width)
        for index in range(APPROXIMATOR_LAYERS):
            for part in ("in_layer", "out_layer"):
                self.linear(state, f"{name}.layers.{index}.{part}", width, width, gain=1.4)
            state[f"{name}.norms.{index}.scale"] = torch.ones(width)
        self.linear(state, f"{name}.out_proj", width, hidden, gain=0.35)


def flux2(
    *, hidden: int, double: int, single: int, context: int, guidance: bool, seed: int
) -> State:
    """Make a FLUX.2 model; without guidance it is klein."""
    make, state, mlp = FamilyMaker(seed), State(), FLUX2_MLP * hidden
    make.matrix(state, "img_in", FLUX2_CHANNELS, hidden)
    make.matrix(state, "txt_in", context, hidden)
    for name in ("time_in", "guidance_in") if guidance else ("time_in",):
        make.matrix(state, f"{name}.in_layer", TIME_WIDTH, hidden, gain=1.4)
        make.matrix(state, f"{name}.out_layer", hidden, hidden, gain=1.4)
    for stream in ("double_stream_modulation_img", "double_stream_modulation_txt"):
        make.matrix(state, f"{stream}.lin", hidden, 6 * hidden)
    make.matrix(state, "single_stream_modulation.lin", hidden, 3 * hidden)
    for block in (f"double_blocks.{index}" for index in range(double)):
        for stream in ("img", "txt"):
            make.matrix(state, f"{block}.{stream}_attn.qkv", hidden, 3 * hidden)
            make.norm(state, f"{block}.{stream}_attn.norm")
            make.matrix(state, f"{block}.{stream}_attn.proj", hidden, hidden, gain=2.0)
            make.matrix(state, f"{block}.{stream}_mlp.0", hidden, 2 * mlp)
            make.matrix(state, f"{block}.{stream}_mlp.2", mlp, hidden, gain=GATED_GAIN)
    for block in (f"single_blocks.{index}" for index in range(single)):
        make.matrix(state, f"{block}.linear1", hidden, 3 * hidden + 2 * mlp)
        make.matrix(state, f"{block}.linear2", hidden + mlp, hidden, gain=2.0)
        make.norm(state, f"{block}.norm")
    make.matrix(state, "final_layer.adaLN_modulation.1", hidden, 2 * hidden, gain=0.6)
    make.matrix(state, "final_layer.linear", hidden, FLUX2_CHANNELS)
    return state


def chroma(*, hidden: int, double: int, single: int, context: int, seed: int) -> State:
    """Make a Chroma model: FLUX.1's blocks without their own modulation."""
    make, state = FamilyMaker(seed), State()
    make.linear(state, "img_in", PATCH_COLUMNS, hidden)
    _chroma_blocks(make, state, hidden=hidden, double=double, single=single, context=context)
    make.linear(state, "final_layer.linear", hidden, PATCH_COLUMNS)
    return state


def radiance(
    *, hidden: int, double: int, single: int, context: int, predicts_image: bool, seed: int
) -> State:
    """Make a Chroma Radiance model, which works on pixels; ``predicts_image`` marks "x0"."""
    make, state = FamilyMaker(seed), State()
    columns = RGB * RADIANCE_PATCH**2
    kernel = make.normal(hidden, RGB, RADIANCE_PATCH, RADIANCE_PATCH, std=columns**-0.5)
    state["img_in_patch.weight"] = kernel
    state["img_in_patch.bias"] = make.normal(hidden, std=0.05)
    _chroma_blocks(make, state, hidden=hidden, double=double, single=single, context=context)
    nerf = NERF_WIDTH
    make.linear(state, "nerf_image_embedder.embedder.0", RGB + NERF_FREQUENCIES**2, nerf)
    for block in (f"nerf_blocks.{index}" for index in range(NERF_BLOCKS)):
        make.linear(state, f"{block}.param_generator", hidden, 3 * nerf**2 * NERF_MLP)
        state[f"{block}.norm.scale"] = torch.ones(nerf)
    state["nerf_final_layer_conv.norm.scale"] = torch.ones(nerf)
    state["nerf_final_layer_conv.conv.weight"] = make.normal(RGB, nerf, 3, 3, std=0.05)
    state["nerf_final_layer_conv.conv.bias"] = make.normal(RGB, std=0.05)
    if predicts_image:
        state["__x0__"] = torch.empty(0)
    return state


def _chroma_blocks(
    make: FamilyMaker, state: State, *, hidden: int, double: int, single: int, context: int
) -> None:
    make.linear(state, "txt_in", context, hidden)
    make.approximator(state, hidden)
    for block in (f"double_blocks.{index}" for index in range(double)):
        for stream in ("img", "txt"):
            make.linear(state, f"{block}.{stream}_attn.qkv", hidden, 3 * hidden)
            make.norm(state, f"{block}.{stream}_attn.norm")
            make.linear(state, f"{block}.{stream}_attn.proj", hidden, hidden, gain=2.0)
            make.linear(state, f"{block}.{stream}_mlp.0", hidden, 4 * hidden)
            make.linear(state, f"{block}.{stream}_mlp.2", 4 * hidden, hidden)
    for block in (f"single_blocks.{index}" for index in range(single)):
        make.linear(state, f"{block}.linear1", hidden, 7 * hidden)
        make.linear(state, f"{block}.linear2", 5 * hidden, hidden, gain=2.0)
        make.norm(state, f"{block}.norm")


def ovis(*, hidden: int, double: int, single: int, context: int, seed: int) -> State:
    """Make an Ovis-Image model: FLUX.1 with gated feed-forward layers and without pooled text."""
    make, state, mlp = FamilyMaker(seed), State(), 4 * hidden
    make.linear(state, "img_in", PATCH_COLUMNS, hidden)
    make.linear(state, "txt_in", context, hidden)
    state["txt_norm.scale"] = torch.ones(context)
    make.linear(state, "time_in.in_layer", TIME_WIDTH, hidden, gain=1.4)
    make.linear(state, "time_in.out_layer", hidden, hidden, gain=1.4)
    for block in (f"double_blocks.{index}" for index in range(double)):
        for stream in ("img", "txt"):
            make.modulation(state, f"{block}.{stream}_mod", hidden, sets=2)
            make.linear(state, f"{block}.{stream}_attn.qkv", hidden, 3 * hidden)
            make.norm(state, f"{block}.{stream}_attn.norm")
            make.linear(state, f"{block}.{stream}_attn.proj", hidden, hidden, gain=2.0)
            make.gated_mlp(state, f"{block}.{stream}_mlp", hidden, mlp)
    for block in (f"single_blocks.{index}" for index in range(single)):
        make.modulation(state, f"{block}.modulation", hidden, sets=1)
        make.linear(state, f"{block}.linear1", hidden, 3 * hidden + 2 * mlp)
        make.linear(state, f"{block}.linear2", hidden + mlp, hidden, gain=2.0)
        make.norm(state, f"{block}.norm")
    make.linear(state, "final_layer.adaLN_modulation.1", hidden, 2 * hidden, gain=0.6)
    make.linear(state, "final_layer.linear", hidden, PATCH_COLUMNS)
    return state
