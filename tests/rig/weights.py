"""Make the tensors of tiny FLUX, CLIP-L, T5 and VAE models, in ComfyUI's own key names.

Runs in: the rig's environment (numpy and torch; no ComfyUI).

Random weights only test something if every block moves the image. So: linear layers keep the
variance of what they read; query and key norms are raised, so that attention picks some tokens
over others; modulation has gates of about one, so that no block is switched off; the VAE's last
layer has zero-mean rows, so that the image is not one colour.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

State = dict[str, torch.Tensor]

HEAD_WIDTH = 128
TIME_WIDTH = 256
LATENT_CHANNELS = 16
PATCH_COLUMNS = LATENT_CHANNELS * 4
CLIP_WIDTH = 128
CLIP_LAYERS = 2
CLIP_VOCABULARY = 49408
CLIP_POSITIONS = 77
T5_WIDTH = 128
T5_LAYERS = 24  # ComfyUI recognises T5-XXL by its last layer, number 23
T5_FF = 128
T5_HEADS = 2
T5_VOCABULARY = 32128
T5_BUCKETS = 32
VAE_WIDTH = 64
BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159  # FLUX.1's latent format


class Maker:
    """Draw tensors in a fixed order from one seeded generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """Draw from a normal distribution."""
        return torch.randn(*shape, generator=self.generator) * std

    def linear(self, state: State, name: str, columns: int, rows: int, gain: float = 1.0) -> None:
        """Add a linear layer that reads ``columns`` values of variance 1."""
        state[f"{name}.weight"] = self.normal(rows, columns, std=gain * columns**-0.5)
        state[f"{name}.bias"] = self.normal(rows, std=0.05)

    def modulation(self, state: State, name: str, hidden: int, sets: int) -> None:
        """Add a modulation layer: shift, scale, gate, each driven by the vector input."""
        self.linear(state, f"{name}.lin", hidden, 3 * sets * hidden, gain=0.6)
        bias = state[f"{name}.lin.bias"].view(sets, 3, hidden)
        bias[:, 2] += 0.5 + 0.5 * torch.sign(self.normal(sets, hidden))

    def norm(self, state: State, name: str, scale_key: str = "scale") -> None:
        """Add the norms of queries and keys, raised so that attention is selective."""
        for part in ("query_norm", "key_norm"):
            state[f"{name}.{part}.{scale_key}"] = 1.5 + self.normal(HEAD_WIDTH, std=0.1)


def flux(*, hidden: int, double: int, single: int, guidance: bool, seed: int) -> State:
    """Make a FLUX.1 diffusion model of hidden // 128 heads; with guidance it is dev."""
    if hidden % HEAD_WIDTH:
        raise ValueError(f"hidden={hidden} is not a multiple of the head width {HEAD_WIDTH}.")
    make, state = Maker(seed), State()
    make.linear(state, "img_in", PATCH_COLUMNS, hidden)
    make.linear(state, "txt_in", T5_WIDTH, hidden)
    inputs = {"time_in": TIME_WIDTH, "vector_in": CLIP_WIDTH}
    if guidance:
        inputs["guidance_in"] = TIME_WIDTH
    for name, columns in inputs.items():
        make.linear(state, f"{name}.in_layer", columns, hidden, gain=1.4)
        make.linear(state, f"{name}.out_layer", hidden, hidden, gain=1.4)
    for block in (f"double_blocks.{index}" for index in range(double)):
        for stream in ("img", "txt"):
            make.modulation(state, f"{block}.{stream}_mod", hidden, sets=2)
            make.linear(state, f"{block}.{stream}_attn.qkv", hidden, 3 * hidden)
            make.norm(state, f"{block}.{stream}_attn.norm")
            make.linear(state, f"{block}.{stream}_attn.proj", hidden, hidden, gain=2.0)
            make.linear(state, f"{block}.{stream}_mlp.0", hidden, 4 * hidden)
            make.linear(state, f"{block}.{stream}_mlp.2", 4 * hidden, hidden)
    for block in (f"single_blocks.{index}" for index in range(single)):
        make.modulation(state, f"{block}.modulation", hidden, sets=1)
        make.linear(state, f"{block}.linear1", hidden, 7 * hidden)
        make.linear(state, f"{block}.linear2", 5 * hidden, hidden, gain=2.0)
        make.norm(state, f"{block}.norm")
    make.linear(state, "final_layer.adaLN_modulation.1", hidden, 2 * hidden, gain=0.6)
    make.linear(state, "final_layer.linear", hidden, PATCH_COLUMNS)
    return state


def clip_l(*, seed: int) -> State:
    """Make CLIP-L: real vocabulary and positions, few and narrow layers."""
    make, state = Maker(seed), State()
    width, prefix = CLIP_WIDTH, "text_model."
    embeddings = f"{prefix}embeddings."
    state[f"{embeddings}token_embedding.weight"] = make.normal(CLIP_VOCABULARY, width)
    state[f"{embeddings}position_embedding.weight"] = make.normal(CLIP_POSITIONS, width, std=0.3)
    for layer in (f"{prefix}encoder.layers.{index}" for index in range(CLIP_LAYERS)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            make.linear(state, f"{layer}.self_attn.{name}", width, width, gain=1.5)
        make.linear(state, f"{layer}.mlp.fc1", width, 4 * width)
        make.linear(state, f"{layer}.mlp.fc2", 4 * width, width)
        for name in ("layer_norm1", "layer_norm2"):
            _layer_norm(state, f"{layer}.{name}", width)
    _layer_norm(state, f"{prefix}final_layer_norm", width)
    state["text_projection.weight"] = torch.eye(width)
    return state


def _layer_norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"] = torch.ones(width)
    state[f"{name}.bias"] = torch.zeros(width)


def t5(*, seed: int) -> State:
    """Make T5-XXL: real vocabulary and number of layers, narrow layers."""
    make, state = Maker(seed), State()
    width = T5_WIDTH
    state["shared.weight"] = make.normal(T5_VOCABULARY, width)
    for block in (f"encoder.block.{index}.layer" for index in range(T5_LAYERS)):
        for name in ("q", "k", "v", "o"):
            std = width**-0.5 * (0.3 if name in "qk" else 0.7)
            state[f"{block}.0.SelfAttention.{name}.weight"] = make.normal(width, width, std=std)
        state[f"{block}.0.layer_norm.weight"] = torch.ones(width)
        for name in ("wi_0", "wi_1", "wo"):
            weight = make.normal(T5_FF, width, std=0.7 * width**-0.5)
            state[f"{block}.1.DenseReluDense.{name}.weight"] = weight
        state[f"{block}.1.layer_norm.weight"] = torch.ones(width)
    bias = make.normal(T5_BUCKETS, T5_HEADS)
    state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    state["encoder.final_layer_norm.weight"] = torch.ones(width)
    return state


def vae(*, seed: int) -> State:
    """Make a VAE in the TAESD layout, which ComfyUI takes for an ``ae.safetensors`` too."""
    make = Maker(seed)
    state = State(vae_scale=torch.tensor(VAE_SCALE), vae_shift=torch.tensor(VAE_SHIFT))

    def conv(name: str, read: int, written: int, gain: float = 2**0.5, bias: bool = True) -> None:
        # Mostly channel mixing under a blur: the picture gets patches of colour, not static.
        kernel = make.normal(written, read, 1, 1) * BLUR + make.normal(
            written, read, 3, 3, std=0.03
        )
        weight = kernel * gain * read**-0.5
        # Inputs are outputs of ReLU; rows without a mean keep the picture from one flat colour.
        state[f"{name}.weight"] = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        if bias:
            state[f"{name}.bias"] = make.normal(written, std=0.05)

    _taesd(conv, state)
    state["taesd_decoder.19.bias"] = torch.full((3,), 0.5)
    return state


def _taesd(conv: Callable[..., None], state: State) -> None:
    width, z = VAE_WIDTH, LATENT_CHANNELS

    def blocks(name: str, numbers: list[int]) -> None:
        for number in numbers:
            for part, gain in ((0, 1.4), (2, 1.4), (4, 0.7)):
                conv(f"{name}.{number}.conv.{part}", width, width, gain)

    conv("taesd_encoder.0", 3, width)
    blocks("taesd_encoder", [1, 3, 4, 5, 7, 8, 9, 11, 12, 13])
    for number in (2, 6, 10):
        conv(f"taesd_encoder.{number}", width, width, bias=False)
    conv("taesd_encoder.14", width, z, 1.0)

    conv("taesd_decoder.1", z, width)
    blocks("taesd_decoder", [3, 4, 5, 8, 9, 10, 13, 14, 15, 18])
    for number in (7, 12, 17):
        conv(f"taesd_decoder.{number}", width, width, bias=False)
    conv("taesd_decoder.19", width, 3, 0.6)
