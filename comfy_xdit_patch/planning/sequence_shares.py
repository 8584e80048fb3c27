"""How the tokens and heads of one sequence are shared, as plain numbers.

Runs in: host and worker. No torch, no ComfyUI: the same arithmetic on both sides.

Nothing is padded, so a share can be any whole number. ``weights`` are relative: a rank of weight 2
gets twice what one of weight 1 gets, and equal weights share as evenly as whole numbers allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from comfy_xdit_patch.errors import PlanError

SEQUENCE_DIM = 1
"""Where the tokens are in (batch, tokens, features)."""

DAMPING = 0.7
"""How far weights move towards measured speeds. Below 1, so that disturbed calls do not throw them
over; 0.7 leaves 3 % of an error after three moves."""

SMALLEST_PART = 1 / 16
"""No rank's weight falls below this part of an even one: a rank that was slow once must still get
enough work to be measured again."""

KEPT_ANSWERS = 256
"""The steps of a run ask the same: of so many questions the answers are kept."""

MIN_QUERIES = 12_000
"""Queries of all heads together that keep a GPU busy: its cores, about 130 in an H100 or a 4090,
take 128 each."""


def pays_in_halves(num_heads: int, num_queries: int) -> bool:
    """Whether a half of a rank's heads is enough work for a GPU.

    Attention for one half then takes half of the time, and the other half can travel meanwhile.

    Args:
        num_heads: of the rank that has the fewest.
        num_queries: of one head, in all rows of the batch.
    """
    return num_heads // 2 * num_queries >= MIN_QUERIES


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
        # Ranks below the minimum get the minimum, and the other ranks share the rest anew.
        below = {i for i in free if shares[i] < minimum}
        if not below:
            return tuple(shares[i] for i in range(len(weights)))
        fixed |= below


@lru_cache(maxsize=KEPT_ANSWERS)
def weighted_shares(
    *,
    num_text_tokens: int,
    num_image_tokens: int,
    num_reference_tokens: int = 0,
    num_heads: int,
    weights: tuple[float, ...],
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
    parts = [normal(weights[i * degree : (i + 1) * degree]) for i in range(ring_degree)]
    return [min(column) for column in zip(*parts, strict=True)]


def moved_weights(
    weights: Sequence[float], speeds: Sequence[float], *, damping: float = DAMPING
) -> tuple[float, ...]:
    """Move weights towards speeds, in the logarithm: all the way with a ``damping`` of 1."""
    moved = normal(
        [
            old ** (1 - damping) * new**damping
            for old, new in zip(normal(weights), normal(speeds), strict=True)
        ]
    )
    return normal([max(part, SMALLEST_PART / len(moved)) for part in moved])


def _largest_remainders(num_items: int, weights: Sequence[float]) -> tuple[int, ...]:
    total = sum(weights)
    quotas = [num_items * weight / total for weight in weights]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: num_items - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def normal(weights: Sequence[float]) -> tuple[float, ...]:
    """Return weights whose sum is 1."""
    total = sum(weights)
    return tuple(weight / total for weight in weights)


@dataclass(frozen=True, slots=True)
class SequenceShares:
    """How many text, image and reference tokens and heads each rank of one sequence group holds.

    Tokens are shared among all ranks of the group. Heads are shared among ``ulysses_degree``
    neighbours; in a ring every such neighbourhood has all heads.

    A rank keeps ``[its text | its image | its reference tokens]`` through double and single blocks,
    so nothing is moved between the kinds, and every rank's image stream begins with tokens of the
    image: ComfyUI takes the first tokens for those that a ControlNet changes, that belong to the
    time step, and that come out. Shares of the joint sequence differ by at most one token: the text
    is shared larger-first, image and references fill up.
    """

    text: tuple[int, ...]
    image: tuple[int, ...]
    reference: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def ulysses_degree(self) -> int:
        return len(self.heads)

    @property
    def ring_degree(self) -> int:
        return len(self.text) // len(self.heads)

    @property
    def joint(self) -> tuple[int, ...]:
        """Tokens of all kinds on each rank."""
        return tuple(map(sum, zip(self.text, self.image, self.reference, strict=True)))

    def places(self, index: int) -> tuple[tuple[int, int], ...]:
        """Start and end of a rank's text, image and reference tokens in the joint sequence."""
        before_image = sum(self.text)
        before_reference = before_image + sum(self.image)
        offsets = (0, before_image, before_reference)
        kinds = (self.text, self.image, self.reference)
        return tuple(
            (offset + start, offset + end)
            for offset, kind in zip(offsets, kinds, strict=True)
            for start, end in (bounds(kind)[index],)
        )


def shard_sizes(num_items: int, num_shards: int) -> tuple[int, ...]:
    """Share items as evenly as whole numbers allow, larger shards first.

    Source:
        The partition rule of ``torch.tensor_split``, without a tensor.
    """
    if num_shards < 1:
        raise PlanError(f"Cannot share {num_items} items among {num_shards} shards.")
    size, num_larger = divmod(num_items, num_shards)
    return (size + 1,) * num_larger + (size,) * (num_shards - num_larger)


def bounds(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Start and end of each shard in the whole."""
    ends = tuple(accumulate(sizes))
    return tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
