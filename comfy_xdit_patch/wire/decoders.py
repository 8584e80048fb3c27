"""What ComfyUI's VAE decoder is built with, read from one and compared with another.

Runs in: host and worker. No torch.

A VAE may come from a file of its own, from a checkpoint or from a node: a rank is given what its
decoder is made of and its weights, whatever they came from.
"""

from __future__ import annotations

from typing import Any

from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.plain_attributes import Attributes, plain_attributes

MODULE = "comfy.ldm.modules.diffusionmodules.model"
ATTENTION = "optimized_attention"
"""Of ComfyUI's ``AttnBlock``: one of the functions of ``MODULE``, chosen for the card."""


def arguments_of(decoder: Any) -> dict[str, Tree]:
    """Return the arguments of ComfyUI's ``Decoder`` that make one of the same shape."""
    return {
        "ch": decoder.ch,
        "out_ch": decoder.conv_out.out_channels,
        "ch_mult": [level.block[-1].out_channels // decoder.ch for level in decoder.up],
        "num_res_blocks": decoder.num_res_blocks,
        "attn_resolutions": [],
        "in_channels": decoder.in_channels,
        "resolution": decoder.resolution,
        "z_channels": decoder.conv_in.in_channels,
        "tanh_out": decoder.tanh_out,
    }


def attributes_of(decoder: Any) -> Attributes:
    """Return what a decoder's code computes with beside its weights, in texts."""
    found = plain_attributes(decoder)
    attend = decoder.mid.attn_1.optimized_attention
    found.setdefault("mid.attn_1", {})[ATTENTION] = getattr(attend, "__name__", repr(attend))
    return found
