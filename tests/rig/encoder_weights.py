"""Make the tensors of tiny language models, SigLIP, Redux and a KL VAE, in ComfyUI's key names.

Runs in: the rig's environment (torch; no ComfyUI).

A language model here is a 64th as wide as the published one, by which the loading shim knows it.
Its vocabulary and number of layers are real, for ComfyUI brings the tokenizer and takes the
outputs of certain layers.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import torch

from rig.weights import Maker, State

NARROWER = 64
HEAD_WIDTH = 128
QWEN_VOCABULARY = 151936
MISTRAL_VOCABULARY = 1024  # the tokenizer is in the file, and this one has only single bytes
MISTRAL_SPECIAL = 100
TEKKEN_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+[\r\n]*|\s+"
VISION_WIDTH = 72
VISION_LAYERS = 27
VISION_POSITIONS = 729
VISION_PATCH = 14
USO_TOKENS = 64
QWEN_VISION_WIDTH = 1280 // 8
QWEN_VISION_FF = 3420 // 8
QWEN_VISION_LAYERS = 32
VAE_CHANNELS = 32  # four times as many after 2 x 2 pixels of the latent became channels
VAE_WIDTHS = (1, 2, 4, 4)


@dataclass(frozen=True)
class LanguageModel:
    """What distinguishes the language models that FLUX models read their text from."""

    published_width: int
    layers: int
    vocabulary: int = QWEN_VOCABULARY
    has_query_norm: bool = True
    heads: int = 1
    has_bias: bool = False

    @property
    def width(self) -> int:
        """Return the width of the tiny model."""
        return self.published_width // NARROWER


QWEN_3_4B = LanguageModel(2560, layers=28)
QWEN_3_8B = LanguageModel(4096, layers=28)
OVIS_25_2B = LanguageModel(2048, layers=4)
# ComfyUI knows it by the 512 rows of its keys, which are 4 heads.
QWEN_25_7B = LanguageModel(3584, layers=4, has_query_norm=False, heads=4, has_bias=True)
MISTRAL_3 = LanguageModel(5120, 30, vocabulary=MISTRAL_VOCABULARY, has_query_norm=False)


def language_model(model: LanguageModel, *, seed: int) -> State:
    """Make a language model with as many heads of keys as of queries."""
    make, state = Maker(seed), State()
    width, inner = model.width, model.heads * HEAD_WIDTH
    state["model.embed_tokens.weight"] = make.normal(model.vocabulary, width)
    for layer in (f"model.layers.{index}" for index in range(model.layers)):
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = make.normal(inner, width, std=width**-0.5)
            state[f"{layer}.self_attn.{name}.weight"] = weight
            if model.has_bias:
                state[f"{layer}.self_attn.{name}.bias"] = make.normal(inner, std=0.05)
        weight = make.normal(width, inner, std=inner**-0.5)
        state[f"{layer}.self_attn.o_proj.weight"] = weight
        if model.has_query_norm:
            for name in ("q_norm", "k_norm"):
                state[f"{layer}.self_attn.{name}.weight"] = torch.ones(HEAD_WIDTH)
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = make.normal(width, width, std=width**-0.5)
            state[f"{layer}.mlp.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{name}.weight"] = torch.ones(width)
    state["model.norm.weight"] = torch.ones(width)
    return state


def mistral(*, seed: int) -> State:
    """Make FLUX.2's language model with the tokenizer in the file."""
    state = language_model(MISTRAL_3, seed=seed)
    del state["model.norm.weight"]  # published FLUX.2 files end after 30 of 40 layers, without it
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    names += [f"<SPECIAL_{rank}>" for rank in range(len(names), MISTRAL_SPECIAL)]
    names[11], names[17], names[18] = "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"
    tokenizer = {
        "config": {
            "pattern": TEKKEN_PATTERN,
            "num_vocab_tokens": 256,
            "default_vocab_size": MISTRAL_VOCABULARY,
            "default_num_special_tokens": MISTRAL_SPECIAL,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode()}
            for rank in range(256)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ],
    }
    state["tekken_model"] = torch.tensor(list(json.dumps(tokenizer).encode()), dtype=torch.uint8)
    return state


def qwen_vision(*, seed: int) -> State:
    """Make Qwen2.5-VL's eyes: an eighth as wide as published, with heads of the same width."""
    make, state = Maker(seed), State()
    width, ff, joined = QWEN_VISION_WIDTH, QWEN_VISION_FF, 4 * QWEN_VISION_WIDTH
    patch = (3, 2, VISION_PATCH, VISION_PATCH)
    kernel = make.normal(width, *patch, std=(6 * VISION_PATCH**2) ** -0.5)
    state["visual.patch_embed.proj.weight"] = kernel
    for block in (f"visual.blocks.{index}" for index in range(QWEN_VISION_LAYERS)):
        make.linear(state, f"{block}.attn.qkv", width, 3 * width)
        make.linear(state, f"{block}.attn.proj", width, width)
        for name in ("gate_proj", "up_proj"):
            make.linear(state, f"{block}.mlp.{name}", width, ff)
        make.linear(state, f"{block}.mlp.down_proj", ff, width)
        for name in ("norm1", "norm2"):
            state[f"{block}.{name}.weight"] = torch.ones(width)
    state["visual.merger.ln_q.weight"] = torch.ones(width)
    make.linear(state, "visual.merger.mlp.0", joined, joined)
    make.linear(state, "visual.merger.mlp.2", joined, QWEN_25_7B.width)
    return state


def siglip(*, seed: int) -> State:
    """Make SigLIP's image part: real positions and number of layers, narrow layers."""
    make, state = Maker(seed), State()
    width, embeddings = VISION_WIDTH, "vision_model.embeddings"
    kernel = make.normal(width, 3, VISION_PATCH, VISION_PATCH, std=(3 * VISION_PATCH**2) ** -0.5)
    state[f"{embeddings}.patch_embedding.weight"] = kernel
    state[f"{embeddings}.patch_embedding.bias"] = make.normal(width, std=0.05)
    state[f"{embeddings}.position_embedding.weight"] = make.normal(VISION_POSITIONS, width, std=0.3)
    for layer in (f"vision_model.encoder.layers.{index}" for index in range(VISION_LAYERS)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            make.linear(state, f"{layer}.self_attn.{name}", width, width)
        make.linear(state, f"{layer}.mlp.fc1", width, 2 * width)
        make.linear(state, f"{layer}.mlp.fc2", 2 * width, width)
        for name in ("layer_norm1", "layer_norm2"):
            _layer_norm(state, f"{layer}.{name}", width)
    _layer_norm(state, "vision_model.post_layernorm", width)
    return state


def redux(*, context: int, seed: int) -> State:
    """Make Redux: what SigLIP sees becomes tokens of text."""
    make, state = Maker(seed), State()
    make.linear(state, "redux_up", VISION_WIDTH, 3 * context)
    make.linear(state, "redux_down", 3 * context, context, gain=1.8)
    return state


def uso_projector(*, hidden: int, seed: int) -> State:
    """Make USO's projector: three layers of SigLIP become tokens beside those of the text."""
    make, state = Maker(seed), State()
    for level in ("high", "mid", "low"):
        name = f"feature_embedder.{level}"
        make.linear(state, f"{name}_embedding_linear.0", VISION_POSITIONS, USO_TOKENS)
        _layer_norm(state, f"{name}_layer_norm", VISION_WIDTH)
        make.linear(state, f"{name}_projection", VISION_WIDTH, hidden)
    return state


def kl_vae(*, encoder_width: int, decoder_width: int, seed: int) -> State:
    """Make FLUX.2's VAE in the layout of latent-diffusion; both widths are free."""
    make, state = Maker(seed), State()
    z, down, up = VAE_CHANNELS, encoder_width, decoder_width
    _conv(make, state, "encoder.conv_in", 3, down)
    read = down
    for level, factor in enumerate(VAE_WIDTHS):
        for number in range(2):
            name = f"encoder.down.{level}.block.{number}"
            read = _residual(make, state, name, read, factor * down)
        if level < len(VAE_WIDTHS) - 1:
            _conv(make, state, f"encoder.down.{level}.downsample.conv", read, read)
    _middle(make, state, "encoder", read)
    _conv(make, state, "encoder.conv_out", read, 2 * z)
    _conv(make, state, "quant_conv", 2 * z, 2 * z, size=1)
    _conv(make, state, "post_quant_conv", z, z, size=1)
    read = VAE_WIDTHS[-1] * up
    _conv(make, state, "decoder.conv_in", z, read)
    _middle(make, state, "decoder", read)
    for level, factor in reversed(list(enumerate(VAE_WIDTHS))):
        for number in range(3):
            name = f"decoder.up.{level}.block.{number}"
            read = _residual(make, state, name, read, factor * up)
        if level:
            _conv(make, state, f"decoder.up.{level}.upsample.conv", read, read)
    _layer_norm(state, "decoder.norm_out", read)
    _conv(make, state, "decoder.conv_out", read, 3, gain=0.6)
    state["bn.running_mean"], state["bn.running_var"] = torch.zeros(4 * z), torch.ones(4 * z)
    state["bn.num_batches_tracked"] = torch.tensor(1)
    return state


def _middle(make: Maker, state: State, part: str, width: int) -> None:
    if part == "encoder":
        _layer_norm(state, "encoder.norm_out", width)
    for name in ("block_1", "block_2"):
        _residual(make, state, f"{part}.mid.{name}", width, width)
    _layer_norm(state, f"{part}.mid.attn_1.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        _conv(make, state, f"{part}.mid.attn_1.{name}", width, width, size=1)


def _residual(make: Maker, state: State, name: str, read: int, written: int) -> int:
    for number, columns in ((1, read), (2, written)):
        _layer_norm(state, f"{name}.norm{number}", columns)
        _conv(make, state, f"{name}.conv{number}", columns, written, gain=1.4)
    if read != written:
        _conv(make, state, f"{name}.nin_shortcut", read, written, size=1)
    return written


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


def _layer_norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(width), torch.zeros(width)
