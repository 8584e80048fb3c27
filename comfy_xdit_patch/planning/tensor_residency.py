"""What a model takes on a card whose blocks are cut by heads and columns.

Runs in: host and worker. Pure arithmetic: bytes in, a plan or a refusal out.
"""

from __future__ import annotations

from dataclasses import replace

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.residency import Card, ModelSizes, ResidencyPlan, TokenLoad, need_of

TENSOR = "tensor="
"""How a rank is told to hold its part of every block: ``tensor=2``, one of two parts."""


def tensor_mode(degree: int) -> str:
    """Name the mode of a model that is cut into so many parts."""
    return f"{TENSOR}{degree}"


def tensor_degree(mode: str) -> int:
    """Into how many parts a mode cuts each block; 1 for the modes that cut none."""
    return int(mode.removeprefix(TENSOR)) if mode.startswith(TENSOR) else 1


def plan_tensor_residency(
    model: ModelSizes, load: TokenLoad, degree: int, *, cards: tuple[Card, ...]
) -> ResidencyPlan | Refusal:
    """See whether a model fits whose blocks are cut into ``degree`` parts.

    Its activations are counted as if nothing of them were cut, which heads and columns are.
    """
    blocks = model.total_bytes - model.outside_blocks_bytes
    part = replace(model, total_bytes=model.outside_blocks_bytes + -(-blocks // degree))
    # Ranks that cut the same blocks have the same tokens.
    whole_tokens = replace(load, num_shards=(load.num_shards or len(cards)) // degree)
    need = need_of("tensor", part, whole_tokens, cards=cards)
    if need.fits:
        return ResidencyPlan((need,))
    return Refusal(f"the model does not fit on {len(cards)} cards ({need.text})")
