"""Make tiny FLUX ControlNets in the five formats that ComfyUI tells apart by their key names.

Runs in: the rig's environment (numpy and torch; no ComfyUI).

Formats: XLabs (v3), InstantX (diffusers names), Union (InstantX with modes), InstantX inpainting
(17 latent channels), MistoLine. Each is a FLUX without its last layer, with a layer for the hint
and one output layer for each block. Trained files start from output layers of zero; here they are
random, and about a third of the stream they are added to, so that a lost residual shows.
"""

from __future__ import annotations

from rig import weights
from rig.loras import DIFFUSERS_DOUBLE, DIFFUSERS_SINGLE
from rig.weights import LATENT_CHANNELS, PATCH_COLUMNS, Maker, State

GAIN = 0.3
MODES = 10
# Convolutions of the hint: channels read and written, kernel size. Three have a stride of 2.
XLABS_HINT = [(3, 16, 3), *[(16, 16, 3)] * 7]
MISTOLINE_HINT = [(3, 16, 3), (16, 16, 1), *[(16, 16, 3)] * 6, (16, 16, 1), (16, 16, 3)]

DIFFUSERS_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
NORMS_DOUBLE = {
    "attn.norm_q": ("img_attn.norm.query_norm", None),
    "attn.norm_k": ("img_attn.norm.key_norm", None),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", None),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", None),
}
NORMS_SINGLE = {"attn.norm_q": ("norm.query_norm", None), "attn.norm_k": ("norm.key_norm", None)}


def files(*, hidden: int, seed: int) -> dict[str, State]:
    """Return every ControlNet by its file name."""
    return {
        "flux-xlabs-canny-v3.safetensors": xlabs(hidden, seed),
        "flux-instantx-canny.safetensors": instantx(hidden, seed + 1, double=2, single=0),
        "flux-instantx-union.safetensors": instantx(
            hidden, seed + 2, double=2, single=1, modes=MODES
        ),
        "flux-union-pro.safetensors": instantx(hidden, seed + 3, double=2, single=0, modes=MODES),
        "flux-union-pro-2.safetensors": instantx(hidden, seed + 4, double=1, single=0),
        "flux-instantx-inpaint.safetensors": instantx(
            hidden, seed + 5, double=2, single=0, channels=LATENT_CHANNELS + 1
        ),
        "flux-mistoline.safetensors": mistoline(hidden, seed + 6),
    }


def xlabs(hidden: int, seed: int) -> State:
    """Make XLabs' format: ComfyUI's own names, a picture as hint."""
    make, state = Maker(seed), _trunk(hidden, seed, double=2, single=0)
    make.linear(state, "pos_embed_input", PATCH_COLUMNS, hidden)
    _hint(make, state, "input_hint_block", XLABS_HINT)
    for index in range(2):
        make.linear(state, f"controlnet_blocks.{index}", hidden, hidden, gain=GAIN)
    return state


def mistoline(hidden: int, seed: int) -> State:
    """Make MistoLine's format: output layers have an activation, single blocks are there."""
    make, state = Maker(seed), _trunk(hidden, seed, double=1, single=1)
    make.linear(state, "pos_embed_input", PATCH_COLUMNS, hidden)
    _hint(make, state, "input_cond_block.encoder", MISTOLINE_HINT)
    make.linear(state, "controlnet_blocks.0.linear", hidden, hidden, gain=2 * GAIN)
    make.linear(state, "single_controlnet_blocks.0.linear", hidden, hidden, gain=2 * GAIN)
    return state


def instantx(
    hidden: int,
    seed: int,
    *,
    double: int,
    single: int,
    modes: int = 0,
    channels: int = LATENT_CHANNELS,
) -> State:
    """Make InstantX' format: diffusers names, a latent as hint, perhaps modes (Union)."""
    make = Maker(seed)
    state = _to_diffusers(_trunk(hidden, seed, double=double, single=single))
    make.linear(state, "controlnet_x_embedder", channels * 4, hidden)
    for index in range(double):
        make.linear(state, f"controlnet_blocks.{index}", hidden, hidden, gain=GAIN)
    for index in range(single):
        make.linear(state, f"controlnet_single_blocks.{index}", hidden, hidden, gain=GAIN)
    if modes:
        state["controlnet_mode_embedder.weight"] = make.normal(modes, hidden)
    return state


def _trunk(hidden: int, seed: int, *, double: int, single: int) -> State:
    state = weights.flux(
        hidden=hidden, double=double, single=single, guidance=True, seed=seed + 1000
    )
    return {k: tensor for k, tensor in state.items() if not k.startswith("final_layer.")}


def _hint(make: Maker, state: State, name: str, layers: list[tuple[int, int, int]]) -> None:
    for index, (read, written, size) in enumerate(layers):
        std = (2 / (read * size * size)) ** 0.5
        state[f"{name}.{2 * index}.weight"] = make.normal(written, read, size, size, std=std)
        state[f"{name}.{2 * index}.bias"] = make.normal(written, std=0.05)


def _to_diffusers(state: State) -> State:
    """Rename as diffusers does, which keeps the parts of fused matrices apart."""
    state = {name.replace("_norm.scale", "_norm.weight"): t for name, t in state.items()}
    result = State()
    for ours, theirs in DIFFUSERS_TOP.items():
        for end in ("weight", "bias"):
            result[f"{theirs}.{end}"] = state[f"{ours}.{end}"]
    tables = {
        "double_blocks": ("transformer_blocks", DIFFUSERS_DOUBLE | NORMS_DOUBLE),
        "single_blocks": ("single_transformer_blocks", DIFFUSERS_SINGLE | NORMS_SINGLE),
    }
    for kind, (their_kind, table) in tables.items():
        for index in sorted({name.split(".")[1] for name in state if name.startswith(kind)}):
            first: dict[str, int] = {}
            for theirs, (ours, rows) in table.items():
                for end in ("weight", "bias"):
                    key = f"{kind}.{index}.{ours}.{end}"
                    if key not in state:  # norms have no bias
                        continue
                    tensor = state[key]
                    if rows is not None:
                        width = rows * state["img_in.bias"].shape[0]
                        tensor = tensor.narrow(0, first.get(key, 0), width).contiguous()
                        first[key] = first.get(key, 0) + width
                    result[f"{their_kind}.{index}.{theirs}.{end}"] = tensor
    return result
