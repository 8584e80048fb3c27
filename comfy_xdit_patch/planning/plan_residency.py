"""Where a model's weights lie under a plan: the modes that its axes leave.

Runs in: host and the command line's process. Pure arithmetic.
"""

from __future__ import annotations

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.pipeline import most_blocks
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.residency import (
    Card,
    Mode,
    ModelSizes,
    ResidencyPlan,
    TokenLoad,
    plan_residency,
)
from comfy_xdit_patch.planning.tensor_residency import plan_tensor_residency


def residency_of(
    plan: ParallelPlan,
    sizes: ModelSizes,
    load: TokenLoad,
    *,
    num_blocks: int,
    cards: tuple[Card, ...],
    first: Mode = "full",
) -> ResidencyPlan | Refusal:
    """Choose the mode for a plan.

    Args:
        sizes: of the whole model.
        first: the user wants this mode or a later one.
    """
    if plan.tensor_degree > 1:
        return plan_tensor_residency(sizes, load, plan.tensor_degree, cards=cards)
    is_pipeline = plan.pipefusion_degree > 1
    if is_pipeline:
        sizes = sizes.part(most_blocks(plan, num_blocks), num_blocks)
    return plan_residency(sizes, load, cards=cards, first=first, is_pipeline=is_pipeline)
