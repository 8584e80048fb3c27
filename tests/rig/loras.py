"""Make LoRA files for the tiny FLUX model, in the formats that ComfyUI reads.

Runs in: the rig's environment (numpy and torch; no ComfyUI).

Every file changes each matrix it touches by about ``STRENGTH`` of its size: enough to see, not
enough to turn the picture into noise.
"""

from __future__ import annotations

import torch

from rig.weights import PATCH_COLUMNS, Maker, State

STRENGTH = 0.3
RANK = 8
ALPHA = 4.0
OFT_BLOCK = 32
LOKR_FACTOR = 4
CONTROL_COLUMNS = 2 * PATCH_COLUMNS  # the latent, and the picture that steers it
DTYPE = torch.bfloat16

# (rows, columns) of each matrix
Shapes = dict[str, tuple[int, int]]

# diffusers' names of the parts of a block -> ours, and for a part of a fused matrix its number of
# rows in hidden widths.
DIFFUSERS_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 1),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 1),
    "attn.add_q_proj": ("txt_attn.qkv", 1),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 1),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
}
DIFFUSERS_SINGLE = {
    "attn.to_q": ("linear1", 1),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 1),
    "proj_mlp": ("linear1", 4),
    "proj_out": ("linear2", None),
    "norm.linear": ("modulation.lin", None),
}


def files(flux: State, seed: int) -> dict[str, State]:
    """Return the LoRA files for this diffusion model, by file name."""
    shapes = block_shapes(flux)
    made: dict[str, State] = {
        "kohya.safetensors": kohya(shapes, seed),
        "kohya2.safetensors": kohya(shapes, seed + 1),
        "diffusers.safetensors": diffusers(shapes, seed + 2),
        "lokr.safetensors": lokr(shapes, seed + 3),
        "loha.safetensors": loha(shapes, seed + 4),
        "oft.safetensors": oft(shapes, seed + 5),
        "bfl-control.safetensors": bfl_control(flux, seed + 6),
    }
    for state in made.values():
        for name, tensor in state.items():
            state[name] = tensor.to(DTYPE).contiguous()
    return made


def block_shapes(flux: State) -> Shapes:
    """Return the shape of every matrix of the blocks, by module name."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in flux.items()
        if tensor.ndim == 2 and "_blocks." in name
    }


def kohya(shapes: Shapes, seed: int) -> State:
    """Make a LoRA as kohya's trainer writes it: up, down, alpha."""
    make, state = Maker(seed), State()
    for name, (rows, columns) in shapes.items():
        key = _kohya_key(name)
        up, down = pair(make, rows, columns, scale=RANK / ALPHA)
        state[f"{key}.lora_up.weight"] = up
        state[f"{key}.lora_down.weight"] = down
        state[f"{key}.alpha"] = torch.tensor(ALPHA)
    return state


def diffusers(shapes: Shapes, seed: int) -> State:
    """Make a LoRA as diffusers writes it: query, key and value apart, scale before shift."""
    make, state = Maker(seed), State()

    def add(key: str, rows: int, columns: int) -> None:
        up, down = pair(make, rows, columns)
        state[f"transformer.{key}.lora_B.weight"] = up
        state[f"transformer.{key}.lora_A.weight"] = down

    for table, ours, theirs in (
        (DIFFUSERS_DOUBLE, "double_blocks", "transformer_blocks"),
        (DIFFUSERS_SINGLE, "single_blocks", "single_transformer_blocks"),
    ):
        for number in sorted({int(name.split(".")[1]) for name in shapes if ours in name}):
            for key, (part, num_widths) in table.items():
                rows, columns = shapes[f"{ours}.{number}.{part}"]
                rows = rows if num_widths is None else num_widths * columns
                add(f"{theirs}.{number}.{key}", rows, columns)
    hidden = next(columns for name, (_, columns) in shapes.items() if name.endswith(".lin"))
    add("norm_out.linear", 2 * hidden, hidden)
    return state


def lokr(shapes: Shapes, seed: int) -> State:
    """Make a LoKr: a small matrix times (Kronecker) a large one, which is whole or of low rank."""
    make, state = Maker(seed), State()
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        key = _kohya_key(name)
        state[f"{key}.lokr_w1"] = make.normal(LOKR_FACTOR, LOKR_FACTOR)
        size = rows // LOKR_FACTOR, columns // LOKR_FACTOR
        if number % 2:
            state[f"{key}.lokr_w2"] = make.normal(*size, std=STRENGTH * columns**-0.5)
        else:
            up, down = pair(make, *size, scale=RANK / ALPHA * (size[1] / columns) ** 0.5)
            state[f"{key}.lokr_w2_a"], state[f"{key}.lokr_w2_b"] = up, down
            state[f"{key}.alpha"] = torch.tensor(ALPHA)
    return state


def loha(shapes: Shapes, seed: int) -> State:
    """Make a LoHa: two matrices of low rank, multiplied element by element."""
    make, state = Maker(seed), State()
    for name, (rows, columns) in shapes.items():
        key = _kohya_key(name)
        state[f"{key}.hada_w1_a"] = make.normal(rows, RANK, std=RANK**-0.25)
        state[f"{key}.hada_w1_b"] = make.normal(RANK, columns, std=RANK**-0.25)
        up, down = pair(make, rows, columns, scale=RANK / ALPHA)
        state[f"{key}.hada_w2_a"], state[f"{key}.hada_w2_b"] = up, down
        state[f"{key}.alpha"] = torch.tensor(ALPHA)
    return state


def oft(shapes: Shapes, seed: int) -> State:
    """Make an OFT: small rotations of groups of rows."""
    make, state = Maker(seed), State()
    # The rotation of a skew-symmetric Q is about I + 2 Q; Q is blocks minus their transpose.
    std = STRENGTH / 2 * (2 * OFT_BLOCK) ** -0.5
    for name, (rows, _) in shapes.items():
        blocks = make.normal(rows // OFT_BLOCK, OFT_BLOCK, OFT_BLOCK, std=std)
        state[f"{_kohya_key(name)}.oft_blocks"] = blocks
    return state


def bfl_control(flux: State, seed: int) -> State:
    """Make a LoRA like FLUX.1 Canny and Depth: wider ``img_in``, biases, norms replaced."""
    make, state = Maker(seed), State()
    for name, tensor in flux.items():
        module = name.removesuffix(".weight")
        if name.endswith("_norm.scale"):
            state[name] = tensor + make.normal(*tensor.shape, std=0.1)
        elif tensor.ndim == 2 and ("_blocks." in name or module in ("img_in", "txt_in")):
            rows, columns = tensor.shape
            columns = CONTROL_COLUMNS if module == "img_in" else columns
            up, down = pair(make, rows, columns)
            state[f"{module}.lora_B.weight"], state[f"{module}.lora_A.weight"] = up, down
            state[f"{module}.lora_B.bias"] = make.normal(rows, std=0.05)
    return state


def pair(
    make: Maker, rows: int, columns: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices whose product is ``scale * STRENGTH`` of a linear layer's matrix."""
    up = make.normal(rows, RANK, std=scale * STRENGTH * RANK**-0.5)
    return up, make.normal(RANK, columns, std=columns**-0.5)


def _kohya_key(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")
