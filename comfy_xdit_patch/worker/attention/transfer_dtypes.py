"""Values in 8 bits for the way from rank to rank, each few of them with a scale. Approximate.

Runs in: worker process.

Dimension letters in this file
    N  scales
    V  values that share a scale, neighbours in one head of one token
    B  bytes of these: V codes, then the scale in the model's dtype

What arrives does not depend on which rank had which tokens, nor on how many ranks there are: with
other shares a picture is the same.
"""

from __future__ import annotations

import torch

from comfy_xdit_patch.planning.transfers import TransferDtype

CODES: dict[TransferDtype, tuple[torch.dtype, float]] = {
    "fp8": (torch.float8_e4m3fn, 448),
    # Not 127: the scale is rounded to the model's dtype, and in bf16 that would make 128 of it.
    "int8": (torch.int8, 126),
}
"""The dtype of the codes, and what the largest of the values with one scale becomes."""


def quantised(x: torch.Tensor, dtype: TransferDtype, together: int) -> torch.Tensor:
    """Return bytes for values, both in one dimension. The values stay as they are.

    Args:
        together: V.
    """
    x_NV = x.view(-1, together)
    wire_NB = x.new_empty(len(x_NV), together + x.element_size(), dtype=torch.uint8)
    codes_NV, scales_N1 = _parts(wire_NB, dtype, together, x.dtype)
    torch.linalg.vector_norm(x_NV, torch.inf, dim=1, keepdim=True, out=scales_N1)
    # Where all are 0, a scale of 0 would make them NaN.
    scales_N1.mul_(1 / CODES[dtype][1]).clamp_(min=torch.finfo(x.dtype).tiny)
    scaled_NV = x_NV / scales_N1
    codes_NV.copy_(scaled_NV.round_() if dtype == "int8" else scaled_NV)
    return wire_NB.view(-1)


def dequantised(
    wire: torch.Tensor, dtype: TransferDtype, together: int, of: torch.dtype
) -> torch.Tensor:
    """Return values in the model's dtype ``of`` for the bytes that ``quantised`` made of them."""
    wire_NB = wire.view(-1, together + of.itemsize)
    codes_NV, scales_N1 = _parts(wire_NB, dtype, together, of)
    # torch multiplies int8 by other dtypes, and fp8 by none.
    x_NV = codes_NV * scales_N1 if dtype == "int8" else codes_NV.to(of).mul_(scales_N1)
    return x_NV.view(-1)


def _parts(
    wire_NB: torch.Tensor, dtype: TransferDtype, together: int, of: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    codes_NV, scales_NB = torch.split(wire_NB, [together, of.itemsize], 1)
    return codes_NV.view(CODES[dtype][0]), scales_NB.view(of)
