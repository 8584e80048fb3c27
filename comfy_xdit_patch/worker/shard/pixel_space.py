"""Chroma Radiance's two ends on shards: pixels to tokens, and the head that makes pixels again.

Runs in: worker process.

Dimension letters in this file
    B  batch
    L  local sequence: this rank's patches
    C  channels
    P  side of a patch
    H, W  height and width

The head (comfy/ldm/chroma_radiance/model.py, ``forward_nerf``) works on one patch at a time, and is
given this rank's patches side by side, as an image of one row. Only a convolution at its very end
looks across patches: that one sees the whole image, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.worker.shard.rank_tokens import RankTokens

CONVOLUTION = "nerf_final_layer_conv"


@contextmanager
def sharded_head(
    flux: Any, mine: RankTokens, gather: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Have ``img_in`` return this rank's tokens, and ``forward_nerf`` take them.

    Args:
        gather: joins (B, L, D) of all ranks.
    """
    embed, head = flux.img_in, flux.forward_nerf
    convolution = getattr(flux, CONVOLUTION, None)

    def img_in(pixels: torch.Tensor) -> torch.Tensor:
        return mine.own(embed(pixels), "image")

    def forward_nerf(img_BCHW: torch.Tensor, out_BLD: torch.Tensor, params: Any) -> torch.Tensor:
        side = params.patch_size
        patches = F.unfold(img_BCHW, side, stride=side).transpose(1, 2)
        strip = _row(mine.own(patches, "image"), side)
        with ExitStack() as stack:
            if convolution is not None:
                stack.enter_context(own_attribute(convolution, "forward", lambda x: x))
            strip = head(strip, out_BLD, params)
        patches = gather(F.unfold(strip, side, stride=side).transpose(1, 2))
        whole = F.fold(patches.transpose(1, 2), img_BCHW.shape[-2:], side, stride=side)
        return whole if convolution is None else convolution(whole)

    with own_attribute(flux, "img_in", img_in), own_attribute(flux, "forward_nerf", forward_nerf):
        yield


def _row(patches: torch.Tensor, side: int) -> torch.Tensor:
    """(B, L, C*P*P) -> (B, C, P, L*P)."""
    size = (side, patches.shape[1] * side)
    return F.fold(patches.transpose(1, 2), size, side, stride=side)
