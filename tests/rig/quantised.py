"""Make quantised files of the tiny FLUX model, in the formats that ComfyUI reads.

Runs in: the rig's environment (torch and comfy_kitchen, which defines the layouts; no ComfyUI).

Two generations of files:

- old scaled fp8: every matrix is fp8 with a ``.scale_weight`` beside it, and a tensor named
  ``scaled_fp8`` marks the file; two elements in it ask for full-precision multiplication.
- mixed precision: chosen matrices are quantised, each in a format of its own. The format stands in
  the file's header (``_quantization_metadata``) or in a tensor ``.comfy_quant`` beside each matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rig.weights import State

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
FP4_MAX = 6.0
INPUT_MAX = 16.0  # what is read by a matrix of the tiny model stays below this
INPUT_SCALE = torch.tensor(INPUT_MAX / FP8_MAX)
PLAIN_DTYPE = torch.bfloat16
HEADER = "_quantization_metadata"
# The header names modules without a checkpoint's prefix in one version of ComfyUI and with it in
# another, so the checkpoint of the new generation is the one without a header.
AS_CHECKPOINTS = ("flux1-dev-scaled-fp8.safetensors", "flux1-dev-mixed-fp8-tensors.safetensors")


@dataclass(frozen=True)
class QuantisedFile:
    """The content of one safetensors file."""

    state: State
    metadata: dict[str, str] = field(default_factory=dict)


def files(flux: State) -> dict[str, QuantisedFile]:
    """Return the quantised files of this diffusion model, by file name."""
    made = {
        "scaled-fp8": QuantisedFile(scaled_fp8(flux, with_inputs=False)),
        "scaled-fp8-input": QuantisedFile(scaled_fp8(flux, with_inputs=True)),
        "mixed-fp8": with_header(mixed(flux, fp8)),
        "mixed-fp8-input": with_header(mixed(flux, fp8) | _input_scales(flux, INPUT_SCALE)),
        "mixed-fp8-tensors": QuantisedFile(mixed(flux, fp8)),
        "mxfp8": QuantisedFile(mixed(flux, _mxfp8)),
        "nvfp4": QuantisedFile(mixed(flux, _nvfp4)),
        "nvfp4-input": QuantisedFile(mixed(flux, _nvfp4) | _input_scales(flux, INPUT_SCALE / 6.0)),
        "int8": QuantisedFile(mixed(flux, _int8)),
    }
    return {f"flux1-dev-{name}.safetensors": file for name, file in made.items()}


def scaled_fp8(flux: State, *, with_inputs: bool) -> State:
    """Quantise every matrix, in the layout that ComfyUI had before mixed precision."""
    state = State(scaled_fp8=torch.zeros(0 if with_inputs else 2, dtype=FP8))
    for name, tensor in flux.items():
        if tensor.ndim != 2:
            state[name] = tensor.to(PLAIN_DTYPE)
            continue
        module = name.removesuffix(".weight")
        state[name], state[f"{module}.scale_weight"] = _scaled(tensor)
        if with_inputs:
            state[f"{module}.scale_input"] = INPUT_SCALE.clone()
    return state


def mixed(flux: State, quantise: Callable[[torch.Tensor], State]) -> State:
    """Quantise the large matrices of the blocks; ``quantise`` returns suffixes and tensors."""
    state = State()
    for name, tensor in flux.items():
        if not _is_quantised(name, tensor):
            state[name] = tensor.to(PLAIN_DTYPE)
            continue
        module = name.removesuffix(".weight")
        state |= {f"{module}.{suffix}": part for suffix, part in quantise(tensor).items()}
    return state


def _is_quantised(name: str, tensor: torch.Tensor) -> bool:
    # Published files leave modulation alone, and so does this one: that is what "mixed" means.
    return tensor.ndim == 2 and "_blocks." in name and not name.endswith(".lin.weight")


def _input_scales(flux: State, scale: torch.Tensor) -> State:
    return {
        f"{name.removesuffix('.weight')}.input_scale": scale.clone()
        for name, tensor in flux.items()
        if _is_quantised(name, tensor)
    }


def with_header(state: State) -> QuantisedFile:
    """Move the formats from tensors to the header of the file."""
    suffix = ".comfy_quant"
    formats = {
        name.removesuffix(suffix): json.loads(bytes(state.pop(name).tolist()))
        for name in list(state)
        if name.endswith(suffix)
    }
    header = {"format_version": "1.0", "layers": formats}
    return QuantisedFile(state, {HEADER: json.dumps(header, sort_keys=True)})


def _format(name: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


def _scaled(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = tensor.abs().max().float() / FP8_MAX
    return (tensor.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def fp8(tensor: torch.Tensor) -> State:
    weight, scale = _scaled(tensor)
    return {"weight": weight, "weight_scale": scale, "comfy_quant": _format("float8_e4m3fn")}


def _mxfp8(tensor: torch.Tensor) -> State:
    import comfy_kitchen

    weight, scales = comfy_kitchen.quantize_mxfp8(tensor.to(PLAIN_DTYPE))
    # Published files hold powers of two as bytes: safetensors knew no such type for long.
    return {
        "weight": weight,
        "weight_scale": scales.view(torch.uint8),
        "comfy_quant": _format("mxfp8"),
    }


def _nvfp4(tensor: torch.Tensor) -> State:
    import comfy_kitchen

    scale = tensor.abs().max().float() / (FP8_MAX * FP4_MAX)
    weight, block_scales = comfy_kitchen.quantize_nvfp4(tensor.to(PLAIN_DTYPE), scale)
    return {
        "weight": weight,
        "weight_scale": block_scales,
        "weight_scale_2": scale,
        "comfy_quant": _format("nvfp4"),
    }


def _int8(tensor: torch.Tensor) -> State:
    scale = tensor.abs().max().float() / 127
    weight = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return {"weight": weight, "weight_scale": scale, "comfy_quant": _format("int8_tensorwise")}
