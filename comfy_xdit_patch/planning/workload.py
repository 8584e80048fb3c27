"""Read the sizes of a call from its arguments.

Runs in: host. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comfy_xdit_patch.planning.plan import Workload

if TYPE_CHECKING:
    import torch

CARRIED_ARGUMENTS = (
    "x",
    "timestep",
    "context",
    "y",
    "guidance",
    "ref_latents",
    "ref_latents_method",
    "control",
    "attention_mask",
)
"""What a call's result depends on, beside ``transformer_options``."""


def workload_of(
    flux: Any, arguments: Mapping[str, Any], *, names: Sequence[str] = CARRIED_ARGUMENTS
) -> Workload:
    """Return tokens, heads and batch of one call of ``Flux._forward``, or of a ControlNet's.

    Args:
        names: names of the arguments that the workers are given.
    """
    x = arguments["x"]
    batch = x.shape[0]
    return Workload(
        batch_size=batch,
        num_text_tokens=arguments["context"].shape[1],
        num_image_tokens=num_tokens(flux, x),
        num_reference_tokens=sum(num_tokens(flux, t) for t in arguments.get("ref_latents") or ()),
        num_heads=flux.num_heads,
        is_batch_divisible=all(
            t.ndim > 0 and t.shape[0] == batch
            for name in names
            for t in _tensors(arguments.get(name))
        ),
    )


def num_tokens(flux: Any, latent: torch.Tensor) -> int:
    """Tokens that ``Flux.process_img`` makes of a latent."""
    side = int(flux.patch_size)
    return -(-latent.shape[-2] // side) * -(-latent.shape[-1] // side)


def _tensors(value: Any) -> list[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []
