"""Tiles of one picture, decoded before ComfyUI asks for them one by one.

Runs in: host process.

ComfyUI cuts a latent in three ways, decodes one tile after the other and blends them
(``VAE.decode_tiled_`` in comfy/sd.py). How it cuts is its own affair: it is run once with results
without contents and a decoder that answers by empty pictures, and the tiles that it asks for are
noted. Then it runs in earnest, and is answered by what the ranks have made of these very tiles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from comfy_xdit_patch.errors import Refusal, Scope

ELSEWHERE = Refusal("a node decodes tiles in a way of its own", Scope.STEP)


class ElsewhereError(Exception):
    """What decodes a tile is not the decoder that the ranks have."""


class Tiles:
    """The tiles of one picture."""

    def __init__(
        self,
        module: Any,
        *,
        scale: int,
        num_ahead: int,
        decode: Callable[[list[torch.Tensor]], list[torch.Tensor] | Refusal],
    ) -> None:
        """Prepare.

        Args:
            module: ComfyUI's ``Decoder``.
            scale: pixels of a picture for one of its latent, in each direction.
            num_ahead: how many tiles are decoded at once.
            decode: makes pictures (B, 3, H, W) of tiles (B, C, H / scale, W / scale).
        """
        self.is_noting = True
        self.refusal: Refusal | None = None
        """Why ComfyUI has decoded tiles; None if the ranks have made all of them."""
        self._module = module
        self._scale = scale
        self._num_ahead = num_ahead
        self._decode = decode
        self._asked: deque[torch.Tensor] = deque()
        self._ready: deque[tuple[torch.Tensor, torch.Tensor]] = deque()

    def note(self, tiled_scale: Callable[..., object], call: Mapping[str, Any]) -> object:
        """Note the tiles of a call of ComfyUI's ``tiled_scale``; return what has no contents.

        Raises:
            ElsewhereError: the first one reaches another decoder.
        """

        def noted(samples: torch.Tensor) -> object:
            num_asked = len(self._asked)
            picture = call["function"](samples)
            if len(self._asked) == num_asked:
                raise ElsewhereError
            return picture

        return tiled_scale(**{**call, "function": noted, "output_device": "meta", "pbar": None})

    def picture_of(self, module: Any, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        """Return what a tile is decoded to, or None: the caller decodes."""
        if module is not self._module or len(arguments) > 1:
            return None
        latent = arguments["z"]
        if self.is_noting:
            self._asked.append(latent)
            batch, _, height, width = latent.shape
            shape = batch, module.conv_out.out_channels, height * self._scale, width * self._scale
            return torch.empty(shape, dtype=latent.dtype, device=latent.device)
        if not self._ready and self._asked and self.refusal is None:
            tiles = [self._asked.popleft() for _ in range(min(self._num_ahead, len(self._asked)))]
            pictures = self._decode(tiles)
            if isinstance(pictures, Refusal):
                self.refusal = pictures
            else:
                self._ready.extend(zip(tiles, pictures, strict=True))
        if self._ready:
            tile, picture = self._ready.popleft()
            if torch.equal(tile, latent):
                return picture
        self.refusal = self.refusal or ELSEWHERE
        return None


def owners_of(num_pixels: list[int], num_ranks: int) -> list[int]:
    """Return the rank of each tile: the largest first, each to who has the least so far."""
    owners, loads = [0] * len(num_pixels), [0] * num_ranks
    for tile in sorted(range(len(num_pixels)), key=lambda tile: -num_pixels[tile]):
        owners[tile] = loads.index(min(loads))
        loads[owners[tile]] += num_pixels[tile]
    return owners
