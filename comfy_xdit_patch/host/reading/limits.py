"""Whether a call's attention can go round a ring, and its blocks be cut by heads and columns.

Runs in: host process. Reads ComfyUI's objects, changes nothing.

A ring joins parts of attention by their log-sum-exp, which no attention function of ComfyUI's
returns; torch's own kernels run in its place (docs/adr/0014). That is the same up to rounding for
functions that are exact, and something else for those that are not, or that somebody chose.

With ``tensor`` each rank has a part of the blocks' weights (``worker/weights/tensor_blocks.py``),
and code inside of the blocks sees that part: a node's patch sees some of the heads. Patches and
weights that need the whole are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.reading.models import flux_of
from comfy_xdit_patch.host.reading.node_patches import CarriedPatches
from comfy_xdit_patch.planning.tensor_cuts import cuts_of
from comfy_xdit_patch.wire.fingerprint import PREFIX, unpatched
from comfy_xdit_patch.wire.tensors import can_cut

EXACT = {
    "attention_basic",
    "attention_flash",
    "attention_pytorch",
    "attention_split",
    "attention_sub_quad",
    "attention_xformers",
}


HEADS_DIM = 1  # of a mask (B, H, S, S)


def no_ring(*, is_overridden: bool = False, is_prescribed: bool = False) -> Refusal | None:
    """Return why a ring must not be used, or None.

    Args:
        is_overridden: a node chose the attention function of this call.
        is_prescribed: the checkpoint names one for some blocks.
    """
    import comfy.ldm.flux.math

    if is_overridden:
        return Refusal("a node chose the attention function, which a ring cannot use", Scope.STEP)
    if is_prescribed:
        return Refusal("the checkpoint prescribes its attention, which a ring cannot use")
    name = comfy.ldm.flux.math.optimized_attention.__name__
    if name not in EXACT:
        return Refusal(f"ComfyUI was started with {name}, which a ring cannot use", Scope.STEP)
    return None


def no_tensor_call(
    arguments: Mapping[str, Any], carried: CarriedPatches | None, changes: Sequence[Refusal]
) -> Refusal | None:
    """Return why this call's blocks must stay whole, or None.

    Args:
        carried: what the workers are given of nodes' patches.
        changes: why parts of the call would run in this process.
    """
    if changes:
        return Refusal(
            f"XDIT_STRATEGY cuts the blocks (tensor), and they cannot be run one by one: "
            f"{changes[0].reason}",
            changes[0].scope,
        )
    if carried is not None and carried.tree is not None and _reads_heads(carried.tree):
        return Refusal(
            "XDIT_STRATEGY cuts the heads (tensor), and a node's patch may look at all of them",
            Scope.STEP,
        )
    mask = arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[HEADS_DIM] > 1:
        return Refusal(
            "XDIT_STRATEGY cuts the heads (tensor), and the attention mask differs between them",
            Scope.STEP,
        )
    return None


def no_tensor_weights(
    model: Any, degree: int, known: dict[tuple[int, int], Refusal | None]
) -> Refusal | None:
    """Return why a model's weights cannot be cut, or None.

    Args:
        known: what was found in this run, by the model's identity and the degree.
    """
    if (id(model), degree) not in known:
        known[id(model), degree] = _no_cuts(model, degree)
    return known[id(model), degree]


def _no_cuts(model: Any, degree: int) -> Refusal | None:
    flux = flux_of(model)
    stored = unpatched(model.current_patcher)
    for block in cuts_of(flux, degree):
        for cut in block.cuts:
            name = f"{block.name}.{cut.linear}"
            linear = flux.get_submodule(name)
            weight = stored.get(f"{PREFIX}{name}.weight", linear.weight)
            others = [p for key, p in linear.named_parameters() if key not in ("weight", "bias")]
            if not can_cut(weight) or any(p.numel() > 1 for p in others):
                return Refusal(
                    "XDIT_STRATEGY cuts the weights (tensor), and these are quantised in groups"
                )
    return None


def _reads_heads(tree: Mapping[str, Any]) -> bool:
    return any(patches for mode in tree["patches"].values() for patches in mode.values())
