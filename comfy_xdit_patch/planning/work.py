"""How much of a call's work each rank has under a plan.

Runs in: host. Pure arithmetic, no torch.
"""

from __future__ import annotations

from functools import lru_cache

from comfy_xdit_patch.planning.plan import ParallelPlan, Workload

HEAD_WIDTH = 128
"""Features of an attention head in the FLUX family."""

REMEMBERED_CALLS = 64


@lru_cache(maxsize=REMEMBERED_CALLS)
def work_parts(plan: ParallelPlan, workload: Workload) -> tuple[float, ...]:
    """Every rank's part of a call's work: its rows, tokens and heads.

    Attention is ``4 S^2 D`` of ``4 S^2 D + 24 D^2 S`` FLOPs in a block; the rest goes by tokens.
    """
    num_tokens = (
        workload.num_text_tokens + workload.num_image_tokens + workload.num_reference_tokens
    )
    attention = num_tokens / (6 * HEAD_WIDTH * workload.num_heads + num_tokens)
    parts = []
    for rank in range(plan.world_size):
        first, end = plan.batch_rows(rank, workload.batch_size)
        shares = plan.sequence_shares(
            rank,
            num_text_tokens=workload.num_text_tokens,
            num_image_tokens=workload.num_image_tokens,
            num_reference_tokens=workload.num_reference_tokens,
            num_heads=workload.num_heads,
        )
        place = plan.sequence_index(rank)
        ring_place, near = divmod(place, plan.ulysses_degree)
        start = ring_place * plan.ulysses_degree
        queries = sum(shares.joint[start : start + plan.ulysses_degree])
        linear = (1 - attention) * shares.joint[place] / num_tokens
        heads = attention * queries / num_tokens * shares.heads[near] / workload.num_heads
        parts.append((end - first) / workload.batch_size * (linear + heads))
    return tuple(parts)
