"""PipeFusion in numbers: which blocks a stage has, which tokens a pipeline patch has.

Runs in: host and worker. No torch, no ComfyUI: the same arithmetic on both sides.

PipeFusion is an approximation (arXiv:2405.14430). A stage holds neighbouring blocks. The tokens of
a call are cut into pipeline patches, which stream through the stages; in attention a patch sees the
keys and values of patches that have not come yet as the call before left them.

A pipeline patch is [a share of the text | of the image | of the references], so that every token
is computed once. Ranks that share a stage (ulysses) share each patch, rank after rank.
"""

from __future__ import annotations

from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.sequence_shares import (
    SequenceShares,
    bounds,
    proportional,
    shard_sizes,
    weighted_shares,
)

NUM_WARM_UP_CALLS = 1
"""Exact calls at the beginning of each stream. xDiT's default is 1 as well."""

PATCHES_A_STAGE = 2
"""Of P stages and M patches, M / (M + P - 1) of the time is work, for the sampler waits for every
call: 2/3 with as many patches as stages, 4/5 with twice as many (P = 2). More and smaller patches
cost launches and the efficiency of the kernels."""

MIN_STEPS = 5
"""The first call is exact and gains nothing; in fewer steps there is much to lose."""


def num_patches(plan: ParallelPlan, workload: Workload) -> int:
    """Into how many patches the tokens of a call are cut."""
    # Two image tokens for each shard: then none is left without by rounding.
    most = min(workload.num_text_tokens, workload.num_image_tokens // 2) // plan.sequence_degree
    return max(1, min(PATCHES_A_STAGE * plan.pipefusion_degree, most))


def patch_shares(
    plan: ParallelPlan,
    num_patches: int,
    *,
    num_text_tokens: int,
    num_image_tokens: int,
    num_reference_tokens: int,
    num_heads: int,
) -> SequenceShares:
    """Share tokens among all patches and, within a patch, among the ranks of a stage.

    Raises:
        PlanError: a shard would hold no text token or no image token.
    """
    return weighted_shares(
        num_text_tokens=num_text_tokens,
        num_image_tokens=num_image_tokens,
        num_reference_tokens=num_reference_tokens,
        num_heads=num_heads,
        weights=(1,) * (num_patches * plan.ulysses_degree),
        # Patches follow each other in time as the places of a ring do in space.
        ring_degree=num_patches,
    )


def stage_blocks(plan: ParallelPlan, rank: int, num_blocks: int) -> range:
    """Blocks of a rank's stage; double blocks are numbered first.

    All blocks of FLUX cost about the same. A stage is as fast as its slowest rank.

    Raises:
        PlanError: there are fewer blocks than stages.
    """
    speeds = [0] * plan.pipefusion_degree
    for other, weight in enumerate(plan.weights):
        stage = plan.stage_index(other)
        speeds[stage] = min(speeds[stage] or weight, weight)
    even = shard_sizes(num_blocks, plan.pipefusion_degree)
    is_even = len(set(speeds)) == 1 and num_blocks >= len(speeds)
    sizes = even if is_even else proportional(num_blocks, [s or 1 for s in speeds], minimum=1)
    return range(*bounds(tuple(sizes))[plan.stage_index(rank)])


def most_blocks(plan: ParallelPlan, num_blocks: int) -> int:
    """How many blocks the largest stage has."""
    return max(len(stage_blocks(plan, rank, num_blocks)) for rank in range(plan.world_size))


def kept_bytes(plan: ParallelPlan, workload: Workload, *, num_blocks: int, token_bytes: int) -> int:
    """Bytes of keys and values that the tightest rank keeps for one stream of calls.

    Args:
        token_bytes: of one token's features.
    """
    if plan.pipefusion_degree == 1:
        return 0
    most = most_blocks(plan, num_blocks)
    num_rows = -(-workload.batch_size // plan.batch_degree)
    row_bytes = workload.num_tokens * token_bytes
    return 2 * most * -(-num_rows * row_bytes // plan.ulysses_degree)
