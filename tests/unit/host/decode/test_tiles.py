"""Tiles that are decoded before ComfyUI asks for them one by one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_xdit_patch.errors import Refusal, Scope
from comfy_xdit_patch.host.decode.tiles import ELSEWHERE, ElsewhereError, Tiles, owners_of

MODULE = SimpleNamespace(conv_out=SimpleNamespace(out_channels=3))
LATENT = torch.arange(12.0).reshape(1, 1, 2, 6)
FULL = Refusal("no room", Scope.STEP)


def picture(latent: torch.Tensor) -> torch.Tensor:
    return latent.expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def tiled_scale(
    samples: torch.Tensor, function: Callable[..., Any], output_device: str, pbar: Any
) -> list[torch.Tensor]:
    """Cut as ComfyUI does, but into two columns each."""
    out = []
    for first in range(0, samples.shape[3], 2):
        out.append(function(samples[:, :, :, first : first + 2]).to(output_device))
        if pbar is not None:
            pbar.append(first)
    return out


class Vae:
    """ComfyUI's part: it asks for tiles, and decodes what nobody else has."""

    def __init__(self, refuse_after: int = 99, num_ahead: int = 2) -> None:
        self.asked: list[int] = []
        """How many tiles the ranks were given, each time."""
        self.num_alone = self.num_refused = 0
        self.progress: list[int] = []
        self._refuse_after = refuse_after
        self.tiles = Tiles(MODULE, scale=2, num_ahead=num_ahead, decode=self._on_ranks)

    def _on_ranks(self, tiles: list[torch.Tensor]) -> list[torch.Tensor] | Refusal:
        if len(self.asked) == self._refuse_after:
            self.num_refused += 1
            return FULL
        self.asked.append(len(tiles))
        return [picture(tile) for tile in tiles]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        made = self.tiles.picture_of(MODULE, {"z": latent})
        if made is None:
            self.num_alone += 1
            return picture(latent)
        return made

    def picture(self, function: Callable[..., Any] | None = None) -> torch.Tensor:
        call = {
            "samples": LATENT,
            "function": function or self.decode,
            "output_device": "cpu",
            "pbar": self.progress,
        }
        empty = self.tiles.note(tiled_scale, call)
        assert {tile.device.type for tile in empty} == {"meta"}
        self.tiles.is_noting = False
        return torch.cat(tiled_scale(**call), dim=3)


def test_ranks_decode_several_tiles_before_comfyui_asks_for_the_second() -> None:
    vae = Vae()
    assert torch.equal(vae.picture(), picture(LATENT))
    assert vae.asked == [2, 1]
    assert vae.progress == [0, 2, 4]
    assert vae.num_alone == 0
    assert vae.tiles.refusal is None


def test_what_ranks_refuse_comfyui_decodes_from_that_tile_on() -> None:
    vae = Vae(refuse_after=1)
    assert torch.equal(vae.picture(), picture(LATENT))
    assert vae.num_alone == 1
    assert vae.tiles.refusal is FULL


def test_ranks_that_refused_are_not_asked_again() -> None:
    vae = Vae(refuse_after=0, num_ahead=1)
    assert torch.equal(vae.picture(), picture(LATENT))
    assert vae.num_alone == 3
    assert vae.num_refused == 1


def test_a_tile_that_is_not_what_was_noted_is_decoded_by_comfyui() -> None:
    vae = Vae(num_ahead=3)
    noise = iter(range(100))

    def function(samples: torch.Tensor) -> torch.Tensor:
        return vae.decode(samples + next(noise))

    expected = torch.cat([picture(LATENT[..., n : n + 2] + 3 + n // 2) for n in (0, 2, 4)], dim=3)
    assert torch.equal(vae.picture(function), expected)
    assert vae.num_alone == 3
    assert vae.tiles.refusal is ELSEWHERE


def test_one_tile_tells_that_a_node_has_a_decoder_of_its_own() -> None:
    vae, calls = Vae(), []

    def function(samples: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return picture(samples)

    with pytest.raises(ElsewhereError):
        vae.picture(function)
    assert len(calls) == 1


def test_other_decoders_and_other_arguments_are_left_alone() -> None:
    tiles = Vae().tiles
    tiles.is_noting = False
    assert tiles.picture_of(SimpleNamespace(), {"z": LATENT}) is None
    assert tiles.picture_of(MODULE, {"z": LATENT, "timestep": 1}) is None


def test_the_largest_tiles_are_shared_first() -> None:
    assert owners_of([4, 4, 1, 4, 4, 1], 2) == [0, 1, 0, 0, 1, 1]
    assert owners_of([4, 4, 1, 4, 4, 1, 1, 1, 0], 3) == [0, 1, 1, 2, 0, 2, 1, 2, 1]
    assert owners_of([5], 3) == [0]
