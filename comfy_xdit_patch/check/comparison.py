"""How far two latents are apart.

Runs in: the check's process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_xdit_patch.errors import CheckError

if TYPE_CHECKING:
    import torch

LATENT_KEY = "latent_tensor"
"""Of files that ComfyUI's node SaveLatent writes."""
ALLOWED = 2.0
"""Times the difference of two stock runs: ranks round at other places than either does."""
LEAST_BOUND = 2.0**-8
"""One rounding of a bf16 value: two stock runs can be equal by chance."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one latent is from another.

    Attributes:
        max_error: the largest difference, over the largest value of the reference.
        psnr_db: root mean square of the difference against the range of the reference, in decibels;
            None where the two are equal.
    """

    max_error: float
    psnr_db: float | None


def bound_of(stock: Difference) -> float:
    """Return the largest error that is still rounding, from the difference of two stock runs."""
    return max(ALLOWED * stock.max_error, LEAST_BOUND)


def read_latent(path: Path) -> torch.Tensor:
    """Read a file that SaveLatent wrote.

    Raises:
        CheckError: what is in it proves nothing.
    """
    from safetensors.torch import load_file

    latent = load_file(path)[LATENT_KEY].double()
    if not bool(latent.isfinite().all()):
        raise CheckError("The latent has NaN or infinity in it.")
    if not float(latent.std()):
        raise CheckError("The latent is the same everywhere, which proves nothing.")
    return latent


def compare(stock: torch.Tensor, other: torch.Tensor) -> Difference:
    """Compare two latents of the same shape."""
    apart = (stock - other).abs()
    rms = float(apart.square().mean().sqrt())
    span = float(stock.max() - stock.min())
    return Difference(
        max_error=float(apart.max() / stock.abs().max()),
        psnr_db=20 * math.log10(span / rms) if rms else None,
    )
