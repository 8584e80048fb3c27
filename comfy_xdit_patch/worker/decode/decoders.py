"""The VAE decoder that a rank has: ComfyUI's own class, with the weights that the host carried.

Runs in: worker process.

Weights lie in memory that all processes share, and on the device only while a picture is decoded:
what a card has is planned for the diffusion model.
"""

from __future__ import annotations

from typing import Any

import torch

from comfy_xdit_patch.wire.decoders import attributes_of
from comfy_xdit_patch.wire.messages.requests import Decode
from comfy_xdit_patch.wire.packs import PackMap
from comfy_xdit_patch.wire.plain_attributes import changed
from comfy_xdit_patch.wire.slots import SlotMap
from comfy_xdit_patch.wire.values import decode_value
from comfy_xdit_patch.worker.decode.lines import Lines, share
from comfy_xdit_patch.worker.ranks.groups import Groups


class OtherDecoderError(Exception):
    """The decoder that ComfyUI's class makes is not ComfyUI's; the text names what differs."""


class Decoders:
    """The decoder that was used last."""

    def __init__(self, slots: SlotMap, groups: Groups) -> None:
        self._packs = PackMap(slots.__getitem__)
        self._groups = groups
        self._lines: Lines | None = None
        self._key = ""
        self._decoder: Any = None
        self._weights: dict[str, torch.Tensor] = {}

    def decode(self, message: Decode, latent: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Decode this rank's lines of a latent (B, C, H, W). Collective.

        Returns:
            Its lines of the picture, the first one's number, and the bytes sent to other ranks.

        Raises:
            OtherDecoderError: the host's decoder cannot be made here. Every rank raises it.
        """
        if self._key != message.key:
            self._make(message)
        lines = self._lines
        assert lines is not None, "made"
        first, end = lines.begin(latent.shape[2])
        sent = lines.bytes_sent
        try:
            self._put({n: weight.to(self._groups.device) for n, weight in self._weights.items()})
            picture = self._decoder(latent[:, :, first:end])
        finally:
            self._put(self._weights)
        scale = picture.shape[2] // (end - first)
        return picture, first * scale, lines.bytes_sent - sent

    def forget(self) -> None:
        """Forget the decoder."""
        self._key, self._decoder, self._weights = "", None, {}

    def _make(self, message: Decode) -> None:
        from comfy.ldm.modules.diffusionmodules.model import Decoder

        with torch.device("meta"):
            decoder = Decoder(**message.decoder)
        for module, name in changed(attributes_of(decoder), message.attributes):
            raise OtherDecoderError(f"{module}.{name}".strip("."))
        self.forget()
        self._decoder = decoder.eval().requires_grad_(False)
        self._weights = decode_value(message.weights, {"$pack": self._packs.tensor})
        self._put(self._weights)
        self._lines = Lines(self._groups)
        share(decoder, self._lines)
        self._key = message.key

    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        self._decoder.load_state_dict(weights, assign=True)
