"""A model without the blocks of other stages: a rank of a pipeline loads the weights of its own.

Runs in: worker process.

A block of another stage is never run: its ``forward`` returns what it is given (``stage.py``). Here
an empty module stands in its place, so that ComfyUI's memory manager finds no weights in it. The
block itself is put aside with its stored weights, which are the mapped file's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.wire.fingerprint import PREFIX


class StagedBlocks:
    """The blocks of one model that are put aside."""

    def __init__(self, flux: Any) -> None:
        self._flux = flux
        self._aside: dict[tuple[str, int], torch.nn.Module] = {}
        self.stage: range | None = None
        """Numbers of the blocks that are in place; None for all."""

    def keep(self, stage: range | None) -> None:
        """Have these blocks in place, all of them for None, with their stored weights."""
        for (name, index), block in self._aside.items():
            getattr(self._flux, name)[index] = block
        self._aside.clear()
        self.stage = stage
        if stage is None:
            return
        blocks = [(n, i) for n in BLOCK_LISTS for i in range(len(getattr(self._flux, n)))]
        for number, (name, index) in enumerate(blocks):
            if number not in stage:
                self._aside[name, index] = getattr(self._flux, name)[index]
                getattr(self._flux, name)[index] = torch.nn.Module()

    def in_place(self, keys: Iterable[str]) -> set[str]:
        """Return which of these keys belong to weights that are in place."""
        aside = tuple(f"{PREFIX}{name}.{index}." for name, index in self._aside)
        return {key for key in keys if not key.startswith(aside)}

    def cut(self, patches: Mapping[str, Any]) -> dict[str, Any]:
        """Return the weight patches of what is in place."""
        here = self.in_place(patches)
        return {key: value for key, value in patches.items() if key in here}
