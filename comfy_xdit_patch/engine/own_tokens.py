"""What belongs to the tokens of a call, cut to those of one rank.

Runs in: worker process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from comfy_xdit_patch.engine.sequence import SEQUENCE_DIM
from comfy_xdit_patch.planning.plan import SequenceShares


class OwnTokens:
    """Cuts what belongs to tokens to those of one rank."""

    def __init__(self, shares: SequenceShares, index: int) -> None:
        text, image, reference = shares.places(index)
        offset = sum(shares.text)
        self._text = text
        self._image = tuple((start - offset, end - offset) for start, end in (image, reference))

    def text(self, whole: torch.Tensor) -> torch.Tensor:
        start, end = self._text
        return whole.narrow(SEQUENCE_DIM, start, end - start)

    def image(self, whole: torch.Tensor) -> torch.Tensor:
        """Tokens of the image stream: this rank's of the image, then its reference tokens.

        A ControlNet's residuals may cover fewer tokens than there are: only the first ones.
        """
        length = whole.shape[SEQUENCE_DIM]
        parts = [
            whole[:, min(start, length) : min(end, length)]
            for start, end in self._image
            if start < length
        ]
        return torch.cat(parts, SEQUENCE_DIM) if len(parts) > 1 else (*parts, whole[:, :0])[0]

    def ranges(self, ranges: Sequence[Sequence[int]]) -> list[list[int]]:
        """Ranges of the image stream, as this rank numbers its own part of it."""
        found = []
        for first, last in ranges:
            before = 0
            for start, end in self._image:
                low, high = max(first, start), min(last, end)
                if low < high:
                    found.append([before + low - start, before + high - start])
                before += end - start
        return found
