"""What one call of a FLUX model came to.

Runs in: host process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.patching.auto import Kind


@dataclass(frozen=True, slots=True)
class Step:
    """A call that is computed.

    ``gathered_for`` is why a part of it ran here; ``is_empty`` says that no block ran on the
    workers: a node left them out, or computed them itself. ``is_one``: it ran here, to be timed.
    """

    out: torch.Tensor
    gathered_for: str | None = None
    is_empty: bool = False
    is_one: bool = False
    kind: Kind | None = None
    """Set if the time of the step tells ``auto`` something."""


def checked(step: Step) -> Step | Refusal:
    """Refuse a result that is no image. Whether ComfyUI's own is one, ComfyUI finds out."""
    # A sum is quicker, and says the same unless half precision overflows in it.
    if not step.out.sum().isfinite() and not step.out.isfinite().all():
        return Refusal("the workers' result has NaN or infinity in it")
    return step
