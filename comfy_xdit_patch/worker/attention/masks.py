"""Attention masks as a rank needs them, and where its tokens stand in ComfyUI's order.

Runs in: worker process.

Dimension letters in this file
    B  batch
    S  sequence, all tokens of it, in ComfyUI's order
    H  heads

Indices are made on the device, because to copy a list there would make the CPU wait for the device.
They are kept, because most calls have the same shares as the call before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from comfy_xdit_patch.planning.sequence_shares import SequenceShares, bounds

Ranges = tuple[tuple[int, int], ...]
"""Start and end of each run of tokens."""
NUM_KEPT = 64
"""Of 4608 tokens, 64 are 2.4 MB."""


@lru_cache(maxsize=NUM_KEPT)
def order_of(ranges: Ranges, device: torch.device) -> torch.Tensor:
    """Return the place of each token, run after run."""
    runs = [torch.arange(start, end, device=device) for start, end in ranges]
    return torch.cat(runs) if len(runs) > 1 else runs[0]


@lru_cache(maxsize=NUM_KEPT)
def inverse_of(ranges: Ranges, device: torch.device) -> torch.Tensor:
    """Return which token stands at each place; the runs must cover all of them."""
    order = order_of(ranges, device)
    inverse = torch.empty_like(order)
    return inverse.index_copy_(0, order, torch.arange(len(order), device=device))


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring ranks' tokens, in the order in which they arrive in an exchange."""

    ranks: range
    with_references: bool
    """Cached references have keys and no queries."""


class RankMasks:
    """The masks of one call. Each is cut once: it is the same for all blocks."""

    def __init__(self, shares: SequenceShares, index: int) -> None:
        self._shares = shares
        self._heads = bounds(shares.heads)[index % shares.ulysses_degree]
        self._known: dict[Any, tuple[torch.Tensor, Any]] = {}

    def ranges(self, span: Span) -> Ranges:
        """Where the tokens of a span stand in ComfyUI's order."""
        kinds = slice(None) if span.with_references else slice(2)
        return tuple(place for rank in span.ranks for place in self._shares.places(rank)[kinds])

    def cut(
        self,
        mask: torch.Tensor,
        *,
        heads: int,
        rows: Span,
        columns: Span,
        finish: Callable[[torch.Tensor], Any] = lambda mask: mask,
    ) -> Any:
        """Return the part for some queries, some keys and this rank's heads, in their order.

        Args:
            heads: of the whole call.
            finish: what the part is turned into before it is kept.

        Shapes:
            ``mask`` (S, S), (B, S, S) or (B, H, S, S); any size may be 1 instead
        """
        key = id(mask), rows, columns
        if key not in self._known:
            part = mask
            for dim, span in ((-2, rows), (-1, columns)):
                if part.shape[dim] > 1:
                    part = part.index_select(dim, order_of(self.ranges(span), mask.device))
            if mask.ndim == 4 and mask.shape[1] == heads:
                part = part[:, slice(*self._heads)]
            # The mask is kept too: otherwise another object could get its id.
            self._known[key] = mask, finish(part)
        return self._known[key][1]
