"""The VAE decoder that a rank has: ComfyUI's own class, with the weights that the host carried.

Runs in: worker process.

Weights lie in memory that all processes share, and on the device only while a picture is decoded:
what a card has is planned for the diffusion model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from comfy_xdit_patch.wire.decoders import attributes_of
from comfy_xdit_patch.wire.messages.requests import Decode
from comfy_xdit_patch.wire.packs import PackMap
from comfy_xdit_patch.wire.plain_attributes import changed
from comfy_xdit_patch.wire.slots import SlotMap
from comfy_xdit_patch.wire.values import decode_value
from comfy_xdit_patch.worker.decode.lines import LINES_DIM, Lines, share
from comfy_xdit_patch.worker.ranks.groups import Groups


class OtherDecoderError(Exception):
    """The decoder that ComfyUI's class makes is not ComfyUI's; the text names what differs."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """This rank's parts of what all ranks make: where each begins in dimension ``dim``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int
    parts: list[tuple[int, torch.Tensor]]
    bytes_sent: int = 0
    """To other ranks."""


class Decoders:
    """The decoder that was used last."""

    def __init__(self, slots: SlotMap, groups: Groups) -> None:
        self._packs = PackMap(slots.__getitem__)
        self._groups = groups
        self._lines: Lines | None = None
        self._key = ""
        self._of_lines: Any = None
        self._of_tiles: Any = None
        self._weights: dict[str, torch.Tensor] = {}

    def decode(self, message: Decode, latent: torch.Tensor) -> Decoded:
        """Decode this rank's lines of a latent (B, C, H, W). Collective.

        Raises:
            OtherDecoderError: the host's decoder cannot be made here. Every rank raises it.
        """
        self._make(message)
        lines = self._lines
        assert lines is not None, "made"
        first, end = lines.begin(latent.shape[2])
        sent = lines.bytes_sent
        with self._on_device(self._of_lines) as decoder:
            picture = decoder(latent[:, :, first:end])
        scale = picture.shape[2] // (end - first)
        shape = (*picture.shape[:2], latent.shape[2] * scale, picture.shape[3])
        sent = lines.bytes_sent - sent
        return Decoded(picture.dtype, shape, LINES_DIM, [(first * scale, picture)], sent)

    def decode_tiles(self, message: Decode, tiles: list[torch.Tensor]) -> Decoded:
        """Decode this rank's tiles (B, C, H, W), each as ComfyUI does, of those of all ranks.

        Raises:
            OtherDecoderError: as above.
        """
        self._make(message)
        values_a_pixel = message.decoder["out_ch"] * 4 ** (len(message.decoder["ch_mult"]) - 1)
        parts, end = [], 0
        with self._on_device(self._of_tiles) as decoder:
            for tile, owner in zip(tiles, message.owners, strict=True):
                if owner == self._groups.rank:
                    parts.append((end, decoder(tile).flatten()))
                end += tile[:, 0].numel() * values_a_pixel
        return Decoded(tiles[0].dtype, (end,), 0, parts)

    def forget(self) -> None:
        """Forget the decoder."""
        self._key, self._of_lines, self._of_tiles, self._weights = "", None, None, {}

    def _make(self, message: Decode) -> None:
        if self._key == message.key:
            return
        from comfy.ldm.modules.diffusionmodules.model import Decoder

        with torch.device("meta"):
            of_lines, of_tiles = (
                Decoder(**message.decoder).eval().requires_grad_(False) for _ in range(2)
            )
        for module, name in changed(attributes_of(of_tiles), message.attributes):
            raise OtherDecoderError(f"{module}.{name}".strip("."))
        self.forget()
        self._of_lines, self._of_tiles = of_lines, of_tiles
        self._weights = decode_value(message.weights, {"$pack": self._packs.tensor})
        self._lines = Lines(self._groups)
        share(of_lines, self._lines)
        self._key = message.key

    @contextmanager
    def _on_device(self, decoder: Any) -> Iterator[Any]:
        weights = {name: w.to(self._groups.device) for name, w in self._weights.items()}
        try:
            decoder.load_state_dict(weights, assign=True)
            yield decoder
        finally:
            decoder.load_state_dict(self._weights, assign=True)
