"""Unequal shares for unequal ranks: whole numbers in proportion to measured speed.

Runs in: host and worker. No torch: the same arithmetic on both sides.

Nothing is padded, so a share can be any whole number. ``weights`` are relative: a rank of weight 2
gets twice what one of weight 1 gets. Equal weights give exactly what ``SequenceShares.even`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from comfy_xdit_patch.errors import PlanError
from comfy_xdit_patch.planning.sequence_shares import SequenceShares

DAMPING = 0.7
"""How far weights move towards measured speeds. Below 1, so that disturbed calls do not throw them
over; 0.7 leaves 3 % of an error after three moves."""

SMALLEST_PART = 1 / 16
"""No rank's weight falls below this part of an even one: a rank that was slow once must still get
enough work to be measured again."""


def proportional(num_items: int, weights: Sequence[float], *, minimum: int = 0) -> tuple[int, ...]:
    """Share items by the method of largest remainders; of equal remainders the first rank's wins.

    Args:
        minimum: what every rank gets at least.

    Raises:
        PlanError: there are too few items, or a weight is not above 0.
    """
    if not weights or min(weights) <= 0 or num_items < minimum * len(weights):
        raise PlanError(
            f"Cannot share {num_items} items by weights {tuple(weights)}, at least {minimum} each."
        )
    fixed: set[int] = set()
    while True:
        free = [i for i in range(len(weights)) if i not in fixed]
        rest = num_items - minimum * len(fixed)
        shares = dict.fromkeys(fixed, minimum)
        shares.update(zip(free, _largest_remainders(rest, [weights[i] for i in free]), strict=True))
        # Who is below the minimum gets it, and the others share the rest anew.
        below = {i for i in free if shares[i] < minimum}
        if not below:
            return tuple(shares[i] for i in range(len(weights)))
        fixed |= below


def weighted_shares(
    *,
    num_text_tokens: int,
    num_image_tokens: int,
    num_reference_tokens: int = 0,
    num_heads: int,
    weights: Sequence[float],
    ring_degree: int = 1,
) -> SequenceShares:
    """Share a sequence's tokens and heads; every rank holds a text token and an image token.

    Args:
        ring_degree: how many of the ranks have the same heads: those that stand at one place of
            their neighbourhoods (see ``SequenceShares``).

    Raises:
        PlanError: there are fewer text or image tokens than ranks, or a weight is not above 0.
    """
    num_ranks = len(weights)
    num_visual = num_image_tokens + num_reference_tokens
    if min(num_text_tokens, num_image_tokens) < num_ranks:
        raise PlanError(
            f"Cannot share {num_text_tokens} text tokens and {num_image_tokens} image tokens "
            f"among {num_ranks} ranks: one of them would hold none."
        )
    text = proportional(num_text_tokens, weights, minimum=1)
    joint = proportional(num_text_tokens + num_visual, weights)
    visual = tuple(whole - part for whole, part in zip(joint, text, strict=True))
    if min(visual) < 1:
        visual = proportional(num_visual, weights, minimum=1)
    # Cumulative rounding: each rank's part of the image never exceeds what it has room for.
    ends = [end * num_image_tokens // num_visual for end in accumulate(visual)]
    image = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    while min(image) < 1:  # a token of the image against one of the references
        image[image.index(max(image))] -= 1
        image[image.index(min(image))] += 1
    return SequenceShares(
        text=text,
        image=tuple(image),
        reference=tuple(room - part for room, part in zip(visual, image, strict=True)),
        heads=proportional(num_heads, _head_weights(weights, ring_degree)),
    )


def _head_weights(weights: Sequence[float], ring_degree: int) -> list[float]:
    """Weights of the places in a neighbourhood, which are the same in all of them.

    A neighbourhood's queries follow the sum of its weights, so of its heads each rank can do its
    own part of that sum; the neighbourhood where a place's part is least decides.
    """
    degree = len(weights) // ring_degree
    parts = [_normal(weights[i * degree : (i + 1) * degree]) for i in range(ring_degree)]
    return [min(column) for column in zip(*parts, strict=True)]


def moved_weights(
    weights: Sequence[float], speeds: Sequence[float], *, damping: float = DAMPING
) -> tuple[float, ...]:
    """Move weights towards speeds, in the logarithm: all the way with a ``damping`` of 1."""
    moved = _normal(
        [
            old ** (1 - damping) * new**damping
            for old, new in zip(_normal(weights), _normal(speeds), strict=True)
        ]
    )
    return _normal([max(part, SMALLEST_PART / len(moved)) for part in moved])


def _largest_remainders(num_items: int, weights: Sequence[float]) -> tuple[int, ...]:
    total = sum(weights)
    quotas = [num_items * weight / total for weight in weights]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: num_items - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def _normal(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total for weight in weights)
