"""Make GGUF files of the tiny FLUX model, as the converter of ComfyUI-GGUF lays them out.

Runs in: the rig's environment (numpy, torch and gguf; no ComfyUI).

The gguf package quantises Q8_0 and only reads Q4_K, so the quantiser for Q4_K is here: the plain
one, without llama.cpp's search for better scales.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from rig.weights import State

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

ARCHITECTURE = "flux"
SUPER_BLOCK, SUB_BLOCK = 256, 32
MAX_SCALE = 63  # six bits
MAX_QUANT = 15  # four bits

FILES = {
    "flux1-dev-Q8_0.gguf": gguf.GGMLQuantizationType.Q8_0,
    "flux1-dev-Q4_K.gguf": gguf.GGMLQuantizationType.Q4_K,
}


def write(flux: State, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write one file; matrices of the blocks are quantised, the rest is F16 and F32."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for name, tensor in flux.items():
        values = tensor.float().numpy()
        if values.ndim != 2:
            writer.add_tensor(name, values)
        elif "_blocks." in name:
            writer.add_tensor(name, quantise(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(values: Floats, kind: gguf.GGMLQuantizationType) -> Bytes:
    """Return the blocks of a matrix, one row of bytes for each row of numbers."""
    if kind == gguf.GGMLQuantizationType.Q4_K:
        return quantise_q4_k(values)
    quantised: Bytes = gguf.quants.quantize(values, kind)
    return quantised


def quantise_q4_k(values: Floats) -> Bytes:
    """Quantise to Q4_K: in sub-blocks of 32, ``x = d * scale * q - dmin * minimum``.

    A super-block of 256 numbers is 144 bytes: d and dmin (float16), eight scales and eight
    minima of six bits in 12 bytes, and 128 bytes with two four-bit numbers each.
    """
    x = values.reshape(-1, SUPER_BLOCK // SUB_BLOCK, SUB_BLOCK)
    low = -np.minimum(x.min(axis=2), 0)
    width = (x.max(axis=2) + low) / MAX_QUANT
    d = (width.max(axis=1, keepdims=True) / MAX_SCALE).astype(np.float16).astype(np.float32)
    dmin = (low.max(axis=1, keepdims=True) / MAX_SCALE).astype(np.float16).astype(np.float32)
    scale = np.clip(np.rint(width / np.maximum(d, 1e-30)), 1, MAX_SCALE)
    minimum = np.clip(np.rint(low / np.maximum(dmin, 1e-30)), 0, MAX_SCALE)
    shifted = x + (dmin * minimum)[..., None]
    q = np.clip(np.rint(shifted / np.maximum(d * scale, 1e-30)[..., None]), 0, MAX_QUANT)
    pairs = q.astype(np.uint8).reshape(len(x), -1, 2, SUB_BLOCK)
    blocks = [
        d.astype(np.float16).view(np.uint8),
        dmin.astype(np.float16).view(np.uint8),
        _six_bits(scale.astype(np.uint8), minimum.astype(np.uint8)),
        (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(x), -1),
    ]
    return np.concatenate(blocks, axis=1).reshape(len(values), -1)


def _six_bits(scale: Bytes, minimum: Bytes) -> Bytes:
    """Pack eight scales and eight minima: the upper two bits of the last four go to the first."""
    first, last = slice(0, 4), slice(4, 8)
    return np.concatenate(
        [
            scale[:, first] | scale[:, last] >> 4 << 6,
            minimum[:, first] | minimum[:, last] >> 4 << 6,
            scale[:, last] & 15 | (minimum[:, last] & 15) << 4,
        ],
        axis=1,
    )
