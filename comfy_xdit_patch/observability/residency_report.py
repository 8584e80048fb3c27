"""The doctor's section about memory: where FLUX.1-dev's weights would lie, and the arithmetic.

Runs in: the doctor's process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from comfy_xdit_patch.errors import PlanError, Refusal
from comfy_xdit_patch.planning.grid import num_communicators
from comfy_xdit_patch.planning.known_models import FLUX1_DEV
from comfy_xdit_patch.planning.model_shape import PRECISIONS
from comfy_xdit_patch.planning.pipeline import kept_bytes
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.plan_residency import residency_of
from comfy_xdit_patch.planning.planner import FREE, named_plan
from comfy_xdit_patch.planning.residency import (
    Card,
    TokenLoad,
    gib,
)
from comfy_xdit_patch.planning.topology import Device
from comfy_xdit_patch.strategy import AUTO, Strategy

DTYPES = ("bf16", "fp8")
WORLD_SIZES = (2, 4, 8)
EXAMPLE = TokenLoad(num_image_tokens=4096, num_text_tokens=256, hidden_size=FLUX1_DEV.width)
AS_A_SEQUENCE = Strategy("ulysses")
"""Weights lie alike whichever way a free strategy shares rows and tokens."""
WORKLOAD = Workload(
    batch_size=EXAMPLE.num_rows,
    num_text_tokens=EXAMPLE.num_text_tokens,
    num_image_tokens=EXAMPLE.num_image_tokens,
    num_heads=FLUX1_DEV.num_heads,
)


def memory_lines(
    devices: Sequence[Device], budget_bytes: int | None, strategy: Strategy = AUTO
) -> list[str]:
    """Say the plans for FLUX.1-dev within the budget in force.

    Args:
        devices: one for each rank; empty where the settings give none.
        budget_bytes: ``XDIT_GPU_MEMORY``, or None for what the cards have.
        strategy: one that fits the devices. Other numbers of cards that it does not fit are left
            out.
    """
    if budget_bytes is not None:
        world_sizes = sorted({*WORLD_SIZES, len(devices)} - {0})
        pools = [_cards([budget_bytes] * world_size) for world_size in world_sizes]
        lines = [f"budget: {gib(budget_bytes)} GiB on each card (XDIT_GPU_MEMORY)"]
    else:
        known = [device.memory_bytes for device in devices]
        sizes = [size for size in known if size is not None]
        if not devices or len(sizes) < len(known):
            return ["no budget: this process sees no memory of a GPU. Set XDIT_GPU_MEMORY to plan."]
        pools = [_cards(sizes)]
        lines = [f"budget: what the cards have, {', '.join(gib(size) for size in sizes)} GiB"]
    for cards in pools:
        try:
            plan = named_plan(AS_A_SEQUENCE if strategy.name in FREE else strategy, len(cards))
        except PlanError:
            continue
        for dtype in DTYPES:
            model = FLUX1_DEV.sizes(PRECISIONS[dtype])
            lines.append(
                f"FLUX.1-dev {dtype} ({gib(model.total_bytes)} GiB), 1024 x 1024 px, "
                f"{len(cards)} cards:"
            )
            found = residency_of(
                plan,
                model,
                _load(plan),
                num_blocks=FLUX1_DEV.num_blocks,
                cards=cards,
                first="sharded" if strategy.shards_weights else "full",
            )
            text = [f"refused: {found.reason}"] if isinstance(found, Refusal) else found.lines()
            lines += [f"  {line}" for line in text]
    return lines


def _load(plan: ParallelPlan) -> TokenLoad:
    """The example's tokens; what a pipeline's stages keep is counted besides."""
    example = replace(EXAMPLE, num_groups=num_communicators(plan.grid))
    if plan.pipefusion_degree == 1:
        return example
    kept = kept_bytes(
        plan,
        WORKLOAD,
        num_blocks=FLUX1_DEV.num_blocks,
        token_bytes=EXAMPLE.hidden_size * EXAMPLE.bytes_per_value,
    )
    num_shards = plan.world_size // plan.pipefusion_degree
    return replace(example, num_shards=num_shards, kept_bytes=kept)


def _cards(sizes: list[int]) -> tuple[Card, ...]:
    """One card for each rank; ComfyUI's own process computes on the first."""
    return tuple(Card(size, size, has_host=rank == 0) for rank, size in enumerate(sizes))
