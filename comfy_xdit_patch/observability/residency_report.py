"""The doctor's section about memory: where FLUX.1-dev's weights would lie, and the arithmetic.

Runs in: the doctor's process.
"""

from __future__ import annotations

from collections.abc import Sequence

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.residency import (
    Card,
    ModelSizes,
    TokenLoad,
    gib,
    plan_residency,
)
from comfy_xdit_patch.planning.topology import Device

# FLUX.1-dev, from its published architecture.
HIDDEN = 3072
HEAD_WIDTH = 128
NUM_DOUBLE_BLOCKS = 19
NUM_SINGLE_BLOCKS = 38
MLP_RATIO = 4
LATENT_PATCH = 64  # 16 channels x 2 x 2
T5_WIDTH = 4096
CLIP_WIDTH = 768
TIME_WIDTH = 256

DTYPES = {"bf16": 2, "fp8": 1}
COMPUTE_BYTES = 2
WORLD_SIZES = (2, 4, 8)
EXAMPLE = TokenLoad(num_image_tokens=4096, num_text_tokens=256, hidden_size=HIDDEN)


def flux1_dev(bytes_per_weight: int) -> ModelSizes:
    """Count FLUX.1-dev's weights."""
    largest_linear = _linear(HIDDEN, (3 + MLP_RATIO) * HIDDEN)
    return ModelSizes(
        total_bytes=bytes_per_weight
        * (NUM_DOUBLE_BLOCKS * _double() + NUM_SINGLE_BLOCKS * _single() + _outside()),
        largest_block_bytes=bytes_per_weight * max(_double(), _single()),
        outside_blocks_bytes=bytes_per_weight * _outside(),
        cast_bytes=0 if bytes_per_weight == COMPUTE_BYTES else COMPUTE_BYTES * largest_linear,
    )


def _linear(columns: int, rows: int) -> int:
    return columns * rows + rows


def _double() -> int:
    stream = (
        _linear(HIDDEN, 6 * HIDDEN)  # modulation
        + _linear(HIDDEN, 3 * HIDDEN)
        + 2 * HEAD_WIDTH  # norms of q and k
        + _linear(HIDDEN, HIDDEN)
        + _linear(HIDDEN, MLP_RATIO * HIDDEN)
        + _linear(MLP_RATIO * HIDDEN, HIDDEN)
    )
    return 2 * stream


def _single() -> int:
    return (
        _linear(HIDDEN, 3 * HIDDEN)  # modulation
        + _linear(HIDDEN, (3 + MLP_RATIO) * HIDDEN)
        + _linear((1 + MLP_RATIO) * HIDDEN, HIDDEN)
        + 2 * HEAD_WIDTH
    )


def _outside() -> int:
    embedders = sum(
        _linear(width, HIDDEN) + _linear(HIDDEN, HIDDEN)
        for width in (TIME_WIDTH, TIME_WIDTH, CLIP_WIDTH)  # time, guidance, pooled text
    )
    last = _linear(HIDDEN, 2 * HIDDEN) + _linear(HIDDEN, LATENT_PATCH)
    return _linear(LATENT_PATCH, HIDDEN) + _linear(T5_WIDTH, HIDDEN) + embedders + last


def memory_lines(devices: Sequence[Device], budget_bytes: int | None) -> list[str]:
    """Say the plans for FLUX.1-dev within the budget in force.

    Args:
        devices: one for each rank; empty where the settings give none.
        budget_bytes: ``XDIT_GPU_MEMORY``, or None for what the cards have.
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
        for dtype, bytes_per_weight in DTYPES.items():
            model = flux1_dev(bytes_per_weight)
            lines.append(
                f"FLUX.1-dev {dtype} ({gib(model.total_bytes)} GiB), 1024 x 1024 px, "
                f"{len(cards)} cards:"
            )
            plan = plan_residency(model, EXAMPLE, cards=cards)
            text = [f"refused: {plan.reason}"] if isinstance(plan, Refusal) else plan.lines()
            lines += [f"  {line}" for line in text]
    return lines


def _cards(sizes: list[int]) -> tuple[Card, ...]:
    """One card for each rank; ComfyUI's own process computes on the first."""
    return tuple(Card(size, size, has_host=rank == 0) for rank, size in enumerate(sizes))
