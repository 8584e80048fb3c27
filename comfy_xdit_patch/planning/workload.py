"""Read the sizes of a call from its arguments.

Runs in: host. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comfy_xdit_patch.planning.eligibility import CARRIED_ARGUMENTS
from comfy_xdit_patch.planning.plan import Workload

if TYPE_CHECKING:
    import torch


def workload_of(flux: Any, arguments: Mapping[str, Any]) -> Workload:
    """Return tokens, heads and batch of one call of ``Flux._forward``."""
    x, side = arguments["x"], flux.patch_size
    latents = [x, *(arguments.get("ref_latents") or ())]
    batch = x.shape[0]
    return Workload(
        batch_size=batch,
        num_text_tokens=arguments["context"].shape[1],
        num_image_tokens=sum(-(-t.shape[-2] // side) * -(-t.shape[-1] // side) for t in latents),
        num_heads=flux.num_heads,
        is_batch_divisible=all(
            t.ndim > 0 and t.shape[0] == batch
            for name in CARRIED_ARGUMENTS
            for t in _tensors(arguments.get(name))
        ),
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []
