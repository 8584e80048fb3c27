"""How the tokens and heads of one sequence are shared, as plain numbers.

Runs in: host and worker. No torch, no ComfyUI: the same arithmetic on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from comfy_xdit_patch.errors import PlanError


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

    @classmethod
    def even(
        cls,
        *,
        num_text_tokens: int,
        num_image_tokens: int,
        num_reference_tokens: int = 0,
        num_heads: int,
        num_shards: int,
        ring_degree: int = 1,
    ) -> SequenceShares:
        """Share as evenly as whole numbers allow. Nothing has to divide anything.

        Args:
            num_shards: ranks of the sequence group.
            ring_degree: how many of them have the same heads.

        Raises:
            PlanError: a rank would hold no text token or no image token (ComfyUI's blocks cannot
                reshape an empty stream). No heads is legal: that rank waits in attention.
        """
        num_visual = num_image_tokens + num_reference_tokens
        joint = shard_sizes(num_text_tokens + num_visual, num_shards)
        text = shard_sizes(num_text_tokens, num_shards)
        visual = tuple(whole - part for whole, part in zip(joint, text, strict=True))
        # Cumulative rounding: each rank's part of the image never exceeds what it has room for.
        image_ends = [end * num_image_tokens // max(num_visual, 1) for end in accumulate(visual)]
        image = tuple(
            end - start for start, end in zip([0, *image_ends[:-1]], image_ends, strict=True)
        )
        reference = tuple(room - part for room, part in zip(visual, image, strict=True))
        if min(text) < 1 or min(image) < 1:
            raise PlanError(
                f"Cannot share {num_text_tokens} text tokens and {num_image_tokens} image tokens "
                f"among {num_shards} ranks: one of them would hold none."
            )
        heads = shard_sizes(num_heads, num_shards // ring_degree)
        return cls(text=text, image=image, reference=reference, heads=heads)

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
