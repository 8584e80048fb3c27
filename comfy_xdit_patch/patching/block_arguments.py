"""What a block is called with, in the terms of the workers.

Runs in: host process.
"""

from __future__ import annotations

from typing import Any

from comfy_xdit_patch.patching.remote_tokens import Counts
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import SequenceShares


def shares_of_counts(flux: Any, counts: Counts, plan: ParallelPlan) -> SequenceShares:
    """The shares of all ranks in the tokens of one block.

    Raises:
        PlanError: a rank would hold none.
    """
    text, image, reference = counts
    return plan.sequence_shares(
        0,
        num_text_tokens=text,
        num_image_tokens=image,
        num_reference_tokens=reference,
        num_heads=flux.num_heads,
    )


def encode_modulation(value: Any) -> Any:
    """Turn what modulates a block into tensors, lists and dictionaries."""
    if isinstance(value, (tuple, list)):
        return [encode_modulation(item) for item in value]
    if all(hasattr(value, name) for name in ("shift", "scale", "gate")):
        return {"$modulation": [value.shift, value.scale, value.gate]}
    return value
