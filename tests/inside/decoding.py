"""Bodies that decode latents: on ranks of their own, and as ComfyUI's nodes do.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import copy
import datetime
import gc
import sys
import time
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules import model
from forwards import status
from sharding import gloo

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.host.pool.pool import AFTER_LOSS_S
from comfy_xdit_patch.worker.decode.lines import Lines, share
from comfy_xdit_patch.worker.ranks.groups import Groups

_vaes: dict[tuple[Any, ...], Any] = {}


def vae_of(width: int, dtype: str = "float32", z: int = 16, is_deep: bool = False) -> Any:
    """Make a VAE as FLUX's are, but for its width (theirs is 128) and random weights.

    Args:
        is_deep: it has as many layers, and as many times its width in each, as FLUX's; without
            this a picture takes a tenth of the time.
        z: channels of the latent; FLUX.2's have four times as many before they are unpacked.
    """
    key = width, dtype, z, is_deep
    if key not in _vaes:
        _vaes.clear()
        gc.collect()
        ddconfig = {
            **{"double_z": True, "z_channels": z, "resolution": 256, "in_channels": 3, "out_ch": 3},
            **{"ch": width, "ch_mult": [1, 2, 4, 4] if is_deep else [1] * 4},
            "num_res_blocks": 2 if is_deep else 1,
            **{"attn_resolutions": [], "dropout": 0.0, "batch_norm_latent": z == 32},
        }
        config = {"ddconfig": ddconfig, "embed_dim": z}
        generator = torch.Generator().manual_seed(5)
        state = {}
        for name, tensor in AutoencoderKL(**config).state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.startswith("bn."):
                state[name] = noise.abs() + 0.5 if "var" in name else noise * 0.1
            elif tensor.ndim == 4:
                state[name] = noise * (tensor[0].numel() ** -0.5)
            else:
                state[name] = noise * 0.1 + ("norm" in name and "weight" in name)
        vae = comfy.sd.VAE(sd=state, config={"params": config}, dtype=getattr(torch, dtype))
        if z == 32:
            vae.upscale_ratio *= 2  # As ComfyUI has it, where it reads the file without a config.
        _vaes[key] = vae
    return _vaes[key]


def latent_of(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, channels, height, width, generator=generator)


def lines(
    store: str, rank: int, world_size: int, attention: str, dtype: str, sizes: list[list[int]]
) -> list[dict[str, float]]:
    """Decode latents whole and as one of several ranks; return how far they are apart.

    Args:
        attention: one of ComfyUI's functions for VAEs.
        sizes: batch, height and width of latents.
    """
    whole = vae_of(32, dtype, is_deep=True).first_stage_model.decoder
    whole.mid.attn_1.optimized_attention = getattr(model, attention)
    mine = copy.deepcopy(whole)
    results = []
    with gloo(store, rank, world_size), torch.inference_mode():
        device, timeout = torch.device("cpu"), datetime.timedelta(seconds=60)
        shared = Lines(
            Groups(rank=rank, world_size=world_size, device=device, step_timeout=timeout)
        )
        share(mine, shared)
        for batch, height, width in sizes:
            latent = latent_of(batch, 16, height, width).to(whole.conv_in.weight.dtype)
            expected = whole(latent)
            first, end = shared.begin(height)
            got = mine(latent[:, :, first:end])
            part = expected[:, :, first * 8 : end * 8]
            assert got.shape == part.shape
            results.append(
                {
                    "error": (got - part).abs().max().item(),
                    "size": expected.abs().max().item(),
                    "spread": expected.float().std().item(),
                    "sent": shared.bytes_sent,
                }
            )
    return results


def start() -> None:
    """Have the ranks ready, as a model of FLUX's has them; after losses that takes a while."""
    pool = sys.modules["comfy_xdit_patch.host.guest.activation"].ACTIVATION.host.pool
    end = time.monotonic() + AFTER_LOSS_S[2]
    while pool.crew is None:
        pool.start()
        try:
            pool.wait_until_ready(lambda: None)
        except WorkerError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def decode(
    path: str,
    out: str,
    size: list[int],
    width: int = 32,
    dtype: str = "float32",
    z: int = 16,
    patch: str = "",
    tile: int = 0,
) -> dict[str, Any]:
    """Decode a latent as the nodes do, and save the picture.

    Args:
        path: of no matter; a part of what names the call.
        size: batch, height and width of what the decoder gets.
        patch: what a node does to the VAE before.
        tile: size of tiles of the latent; 0 for none.
    """
    vae = vae_of(width, dtype, z)
    batch, height, breadth = size
    channels, scale = (z * 4, 2) if z == 32 else (z, 1)
    latent = latent_of(batch, channels, height // scale, breadth // scale)
    if patch:
        patched(vae, patch)
    progress: list[tuple[int, int]] = []
    hook = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.PROGRESS_BAR_HOOK = lambda value, total, *_, **__: progress.append((value, total))
    seconds = time.perf_counter()
    try:
        with torch.inference_mode():
            picture = decoded(vae, latent, tile)
    finally:
        comfy.utils.PROGRESS_BAR_HOOK = hook
        if patch:
            _vaes.clear()
    seconds = time.perf_counter() - seconds
    torch.save(picture, out)
    return {**status(), "seconds": seconds, "progress": progress}


def compare(size: list[int], dtype: str, width: int = 128, tile: int = 0) -> dict[str, Any]:
    """Decode on the ranks that live, and then in ComfyUI alone; times in seconds."""
    points = sys.modules["comfy_xdit_patch.host.guest.activation"].ACTIVATION.decode
    start()
    vae = vae_of(width, dtype, is_deep=True)
    latent = latent_of(size[0], 16, *size[1:])
    before = status()["totals"]["decodes_parallel"]
    seconds, pictures = {}, {}
    for way in (True, False):
        points.active = way
        begin = time.perf_counter()
        with torch.inference_mode():
            pictures[way] = decoded(vae, latent, tile)
        seconds[way] = time.perf_counter() - begin
    points.active = True
    after = status()
    assert after["totals"]["decodes_parallel"] == before + 1, after["decodes_alone"]
    difference = (pictures[True] - pictures[False]).float().abs()
    return {
        "ranks": seconds[True],
        "one": seconds[False],
        "largest difference": difference.max().item(),
        "mean difference": difference.mean().item(),
        "spread": pictures[False].float().std().item(),
    }


def decoded(vae: Any, latent: torch.Tensor, tile: int) -> torch.Tensor:
    """Decode as the nodes do: whole, or in tiles of the latent that overlap by an eighth."""
    if not tile:
        return vae.decode(latent)
    return vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=tile // 8)


def patched(vae: Any, patch: str) -> None:
    """Change a VAE as nodes do."""
    decoder = vae.first_stage_model.decoder
    if patch == "weights":
        vae.patcher.add_patches({"decoder.conv_in.bias": ("diff", (torch.ones(32),))}, 0.5)
    elif patch == "forward":
        stock = decoder.conv_out.forward
        decoder.conv_out.forward = lambda x: stock(x) + 0.25
    elif patch == "hook":
        decoder.mid.block_1.register_forward_hook(lambda *_: None)
    elif patch == "attention":
        stock_attention = decoder.mid.attn_1.optimized_attention
        decoder.mid.attn_1.optimized_attention = lambda *qkv: stock_attention(*qkv) * 0.5
    elif patch == "attribute":
        decoder.norm_out.eps = 0.1
    elif patch == "no memory":
        no_memory_for_whole_pictures(vae.first_stage_model)
    elif patch == "another decoder":
        vae.first_stage_model.decode = lambda z: torch.nn.functional.interpolate(
            z[:, :3], scale_factor=8
        )
    elif patch == "in place":
        with torch.inference_mode():
            decoder.conv_out.bias += 0.5
    else:
        raise ValueError(patch)


def no_memory_for_whole_pictures(model: Any) -> None:
    """Have ComfyUI find that a card has not the memory for more than a tile."""
    stock = model.decode

    def decode(z: torch.Tensor) -> Any:
        if z.shape[2] * z.shape[3] > 64 * 64:
            raise comfy.model_management.OOM_EXCEPTION("no memory")
        return stock(z)

    model.decode = decode


def interrupted(out: str, size: list[int], tile: int, dtype: str) -> str:
    """Cancel the prompt, and decode: ComfyUI's own exception comes out."""
    comfy.model_management.interrupt_current_processing(True)
    try:
        decode("", out, size, tile=tile, dtype=dtype)
    except BaseException as error:  # noqa: BLE001 - a test looks what it is
        return type(error).__name__
    finally:
        comfy.model_management.interrupt_current_processing(False)
    return ""
