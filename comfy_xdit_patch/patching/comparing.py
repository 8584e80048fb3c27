"""What ComfyUI holds of a model, to compare it with what the workers hold.

Runs in: host process. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.models import flux_of
from comfy_xdit_patch.transport.fingerprint import (
    BLOCKS,
    agree,
    digests,
    fingerprint,
    is_dynamic,
    stored_weights,
)
from comfy_xdit_patch.transport.replies import Loaded


def expected_fingerprint(base_model: Any) -> str:
    """Return the fingerprint of a model's stored weights.

    Raises:
        ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
    """
    patcher = base_model.current_patcher
    cast = "manual_cast_dtype"
    return fingerprint(
        flux_of(base_model),
        manual_cast_dtype=patcher.object_patches_backup.get(cast, getattr(base_model, cast)),
        patcher=patcher,
    )


def comparison_with(expected: str, *, only_blocks: bool) -> Callable[[Sequence[Loaded]], bool]:
    """Return whether all ranks hold what ComfyUI does, as a function of their replies."""
    return lambda replies: all(
        agree(reply.fingerprint, expected, only_blocks=only_blocks) for reply in replies
    )


def uncast(base_model: Any) -> list[str]:
    """Name the weights that workers must leave in the dtype of the file, as ComfyUI does here."""
    weights = stored_weights(flux_of(base_model), base_model.current_patcher)
    return [weight.name for weight in weights if weight.is_left_uncast]


def is_patched_here(patcher: Any) -> bool:
    """Whether ComfyUI has applied all patches to the weights that this process holds."""
    return (
        not is_dynamic(patcher)
        and not patcher.model.model_lowvram
        and patcher.model.current_weight_patches_uuid == patcher.patches_uuid
    )


def verify(
    base_model: Any,
    theirs: Sequence[dict[str, str]],
    totals: Totals,
    is_whole: bool = True,
    *,
    only_blocks: bool = False,
) -> Refusal | None:
    """Compare the weights in use bit for bit, if the ranks were asked for digests.

    Args:
        is_whole: every rank has all weights; else the ranks together have them.
        only_blocks: no others count: the workers run the blocks alone.
    """
    if not any(theirs):
        return None
    ours = digests(flux_of(base_model))
    everywhere = {*ours} if is_whole else {*ours}.difference(*theirs)
    for rank, found in enumerate(theirs):
        names = {
            name for name in {*everywhere, *found} if name.startswith(BLOCKS) or not only_blocks
        }
        wrong = [name for name in names if ours.get(name) != found.get(name)]
        if wrong:
            name = min(wrong)
            totals.last_error = (
                f"Rank {rank} holds {len(wrong)} of {len(ours)} weights with other contents: "
                f"{name} is {found.get(name)} there and {ours.get(name)} here."
            )
            return Refusal("the weights in use on a rank are not ComfyUI's")
        totals.weights_verified += len(found)
    return None
