"""Choose the plan of one call.

Runs in: host (and the doctor). Pure: numbers in, a plan or a refusal out.
"""

from __future__ import annotations

from math import gcd

from comfy_xdit_patch.errors import PlanError, Refusal, Scope
from comfy_xdit_patch.planning.plan import ParallelPlan, SequenceShares, Workload


def plan_call(
    workload: Workload, *, world_size: int, needs_references: bool = False
) -> ParallelPlan | Refusal:
    """Share the batch first, for it needs no communication, then the token sequence.

    Every rank takes part in every step: a plan that leaves a rank without work is refused. The
    batch axis takes the greatest common divisor of rows and ranks, so that all rows are shared
    equally; what is left goes to the sequence axis (``ulysses``).

    Args:
        needs_references: if there are reference tokens, every rank must hold one.
    """
    batch_degree = gcd(workload.batch_size, world_size) if workload.is_batch_divisible else 1
    plan = ParallelPlan(world_size, batch_degree, world_size // batch_degree)
    try:
        shares = SequenceShares.even(
            num_text_tokens=workload.num_text_tokens,
            num_image_tokens=workload.num_image_tokens,
            num_reference_tokens=workload.num_reference_tokens,
            num_heads=workload.num_heads,
            num_shards=plan.ulysses_degree,
        )
    except PlanError:
        return Refusal(
            f"the image or the prompt has fewer tokens than {world_size} ranks need", Scope.STEP
        )
    if needs_references and workload.num_reference_tokens and min(shares.reference) < 1:
        return Refusal(f"a reference has fewer tokens than {world_size} ranks need", Scope.STEP)
    return plan
