"""Write a FLUX.1 diffusion model with random weights, in ComfyUI's key names.

Runs in: the check's process.

What shaped it:

- FLUX.1 whole has 24 GB, so tensors are written piece by piece, and none lies in memory.
- Random weights show something only if every block moves the latent. So linear layers keep the
  variance of what they read, gates have a variance near 1, and norms of queries and keys are
  raised, so that attention picks some tokens over others.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from comfy_xdit_patch.planning.family import HEAD_WIDTH

TIME_WIDTH = 256
TEXT_WIDTH = 4096
POOLED_WIDTH = 768
PATCH_COLUMNS = 64
"""Values of one image token: 16 channels of 2 x 2 latent pixels."""
VALUE_BYTES = 2
"""Of bf16."""
POOL_VALUES = (1 << 22) + 17
"""Random values that all tensors are cut from, in turn; odd, so that rows do not repeat."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a FLUX.1 model file has: features of a token, and blocks of both kinds."""

    width: int
    num_double: int
    num_single: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the file, and how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * VALUE_BYTES


def weights_of(sizes: Sizes) -> Iterator[Weight]:
    """Name every tensor of FLUX.1-dev."""
    width = sizes.width
    yield from _linear("img_in", PATCH_COLUMNS, width)
    yield from _linear("txt_in", TEXT_WIDTH, width)
    inputs = {"time_in": TIME_WIDTH, "vector_in": POOLED_WIDTH, "guidance_in": TIME_WIDTH}
    for name, columns in inputs.items():
        yield from _linear(f"{name}.in_layer", columns, width, gain=1.4)
        yield from _linear(f"{name}.out_layer", width, width, gain=1.4)
    for index in range(sizes.num_double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{index}.{stream}"
            yield from _linear(f"{name}_mod.lin", width, 6 * width)
            yield from _linear(f"{name}_attn.qkv", width, 3 * width)
            yield from _norms(f"{name}_attn.norm")
            yield from _linear(f"{name}_attn.proj", width, width, gain=2.0)
            yield from _linear(f"{name}_mlp.0", width, 4 * width)
            yield from _linear(f"{name}_mlp.2", 4 * width, width)
    for index in range(sizes.num_single):
        name = f"single_blocks.{index}"
        yield from _linear(f"{name}.modulation.lin", width, 3 * width)
        yield from _linear(f"{name}.linear1", width, 7 * width)
        yield from _linear(f"{name}.linear2", 5 * width, width, gain=2.0)
        yield from _norms(f"{name}.norm")
    yield from _linear("final_layer.adaLN_modulation.1", width, 2 * width, gain=0.6)
    yield from _linear("final_layer.linear", width, PATCH_COLUMNS)


def file_bytes(sizes: Sizes) -> int:
    """Return the size of all tensors; the file has a few KB more."""
    return sum(weight.num_bytes for weight in weights_of(sizes))


def write_model(path: Path, sizes: Sizes, *, seed: int = 1) -> None:
    """Write the file; the same arguments give the same values.

    Source:
        The format of safetensors: the header's length in 8 bytes, the header as JSON, the tensors.
    """
    import torch

    header: dict[str, object] = {}
    end = 0
    for weight in weights_of(sizes):
        offsets = [end, end + weight.num_bytes]
        header[weight.name] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": offsets}
        end += weight.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = torch.randn(POOL_VALUES, generator=torch.Generator().manual_seed(seed))
    place = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights_of(sizes):
            left = prod(weight.shape)
            while left:
                piece = pool[place : place + left]
                values = (piece * weight.std + weight.mean).to(torch.bfloat16)
                file.write(ctypes.string_at(values.data_ptr(), VALUE_BYTES * len(values)))
                left -= len(values)
                place = (place + len(values)) % POOL_VALUES


def _linear(name: str, columns: int, rows: int, gain: float = 1.0) -> Iterator[Weight]:
    """A layer that reads ``columns`` values of variance 1."""
    yield Weight(f"{name}.weight", (rows, columns), gain * columns**-0.5)
    yield Weight(f"{name}.bias", (rows,), 0.05)


def _norms(name: str) -> Iterator[Weight]:
    for part in ("query_norm", "key_norm"):
        yield Weight(f"{name}.{part}.scale", (HEAD_WIDTH,), 0.1, mean=1.5)
