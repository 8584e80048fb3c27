"""Quantised layers that look at their whole input, given a shard of it.

Runs in: worker process.

Almost everything in FLUX works on one token at a time. Two quantised layers do not:
    nvfp4 without an input scale takes the largest value of all its input for a scale
        (comfy/quant_ops.py, TensorCoreNVFP4Layout.quantize; measured on halves of one input:
        0.0108 for the whole, 0.0016 for the first half);
    old scaled fp8 (ComfyUI before 0.33) puts its scale on the weight or on the input, whichever has
        fewer elements (comfy/ops.py, scaled_fp8_ops): a shard may fall on the other side.
Each is told about the whole, and computes itself as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from comfy_xdit_patch.worker.ranks import collectives

ScaledLayers = Mapping[str, Any]


def scaled_layers(flux: Any) -> dict[str, Any]:
    """Layers of old scaled fp8, by name. Later versions convert such files on loading."""
    import comfy.ops

    if not hasattr(comfy.ops, "scaled_fp8_ops"):
        return {}
    return {
        name: module
        for name, module in flux.named_modules()
        if getattr(module, "scale_weight", None) is not None
    }


def stream_of(layer: str) -> str | None:
    """Which tokens a layer of FLUX reads: "image", "text", "joint", or None for no tokens."""
    name = layer.partition(".")[0]
    last = layer.rpartition(".")[2]
    if name in ("img_in", "final_layer"):
        return "image" if name == "img_in" or last == "linear" else None
    if name == "txt_in":
        return "text"
    if name == "single_blocks":
        return "joint" if last in ("linear1", "linear2") else None
    if name == "double_blocks":
        part = layer.split(".")[2]
        if part in ("img_attn", "img_mlp"):
            return "image"
        if part in ("txt_attn", "txt_mlp"):
            return "text"
    return None


@contextmanager
def scales_on_weights(
    layers: ScaledLayers, *, whole: Mapping[str | None, int], local: Mapping[str | None, int]
) -> Iterator[None]:
    """Have layers put their scale where the whole input would have it, while this lasts.

    Args:
        whole: tokens times batch of the whole call, by stream; under None the batch alone.
        local: the same of this rank's shard.
    """
    changed = []
    for name, layer in layers.items():
        stream = stream_of(name)
        width, elements = layer.weight.shape[1], layer.weight.numel()
        # A shard is never larger than the whole: only this way can they differ.
        if whole[stream] * width > elements >= local[stream] * width:
            scale = layer.scale_weight
            changed.append((layer, scale, layer.weight_function))
            layer.weight_function = [*layer.weight_function, _times(scale)]
            layer.scale_weight = torch.nn.Parameter(torch.ones_like(scale), requires_grad=False)
    try:
        yield
    finally:
        for layer, scale, functions in changed:
            layer.scale_weight, layer.weight_function = scale, functions


def _times(scale: torch.Tensor) -> Any:
    def scaled(weight: torch.Tensor) -> torch.Tensor:
        return weight * scale.to(device=weight.device, dtype=weight.dtype)

    return scaled


@contextmanager
def whole_input_scales() -> Iterator[None]:
    """Have nvfp4 scale its input by the largest value on any rank, while this lasts.

    Collective:
        Every rank of the world runs the same layers in the same order meanwhile.
    """
    import comfy.quant_ops

    layout = getattr(comfy.quant_ops, "TensorCoreNVFP4Layout", None)
    if layout is None or "quantize" not in vars(layout):
        yield
        return
    stock = vars(layout)["quantize"]
    quantize_stock = stock.__get__(None, layout)

    def quantize(_: Any, tensor: torch.Tensor, /, scale: Any = None, **options: Any) -> Any:
        if scale is None:
            from comfy_kitchen.float_utils import F4_E2M1_MAX, F8_E4M3_MAX

            largest = tensor.abs().amax().to(torch.float32)
            collectives.all_reduce_max(largest)
            # As stock's quantize has it, which divides in the input's dtype.
            scale = largest.to(tensor.dtype) / (F8_E4M3_MAX * F4_E2M1_MAX)
        return quantize_stock(tensor, scale=scale, **options)

    layout.quantize = classmethod(quantize)
    try:
        yield
    finally:
        layout.quantize = stock
