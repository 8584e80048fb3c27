"""Rows: node packs themselves, from checkouts on this machine; nothing of them is downloaded.

Runs in: the tests (standard library only).

``NODE_PACKS_PATH`` names a directory of checkouts, each under its repository's name. What a node
asks for beside the inputs that a row gives is taken from what the server says of it: its defaults,
and links of the plain graph by their type. So a row need not follow a pack from version to version.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig.feature_controls import XLABS
from rig.feature_graphs import CLIP, DECODER, LOADER, POSITIVE, VAE, Draft, Link
from rig.server import Server

PATH = "NODE_PACKS_PATH"
GGUF_FILE = "flux1-dev-Q8_0.gguf"


class Nodes:
    """The nodes of a server, and the plain graph that some are put into."""

    def __init__(self, server: Server, draft: Draft) -> None:
        self._known: dict[str, Any] = server.request("/object_info")
        self.draft = draft

    def add(self, class_type: str, **given: Any) -> Link:
        """Add a node with the inputs that are given, and whatever else it demands.

        Raises:
            LookupError: the server has no such node, or it demands what nobody knows.
        """
        if class_type not in self._known:
            raise LookupError(f"no node {class_type}: the pack did not load, or has another one")
        demanded: Mapping[str, Any] = self._known[class_type]["input"].get("required", {})
        missing = {name: spec for name, spec in demanded.items() if name not in given}
        found = {name: self._value(name, spec) for name, spec in missing.items()}
        return self.draft.add(class_type, **found, **given)

    def model(self, class_type: str, **given: Any) -> None:
        """Put a node between the model and the sampler."""
        sampler = self.draft.sampler
        self.draft.set(model=self.add(class_type, model=sampler["model"], **given))

    def _value(self, name: str, spec: Any) -> Any:
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        sampler = self.draft.sampler
        links = {
            "MODEL": sampler["model"],
            "CLIP": CLIP,
            "VAE": VAE,
            "LATENT": sampler["latent_image"],
            "CONDITIONING": sampler["negative" if "negative" in name else "positive"],
        }
        if isinstance(kind, str) and kind in links:
            return links[kind]
        if kind == "IMAGE":
            return self.draft.picture()
        if kind == "MASK":
            return self.draft.mask()
        if name in sampler and name not in ("model", "positive", "negative", "latent_image"):
            return sampler[name]
        if "default" in options:
            return options["default"]
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices:
            return choices[0]
        fallback = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
        if kind not in fallback:
            raise LookupError(f"input {name} of kind {kind} is not known here")
        return fallback[kind]


Change = Callable[[Nodes], None]


@dataclass(frozen=True)
class RealPack:
    """A pack: its repository's name, a graph that uses it, and a pack that it needs."""

    repository: str
    change: Change
    beside: str = ""

    def checkouts(self) -> tuple[Path, ...]:
        """Where it lies on this machine, and what it needs beside it; nothing if it is not here."""
        names = [name.lower() for name in (self.repository, self.beside) if name]
        folder = os.environ.get(PATH)
        here = {path.name.lower(): path for path in Path(folder).iterdir()} if folder else {}
        return tuple(here[name] for name in names if name in here) if names[0] in here else ()


def through(class_type: str, **given: Any) -> Change:
    return lambda nodes: nodes.model(class_type, **given)


def another_loader(class_type: str, **given: Any) -> Change:
    """Load the model by another node."""

    def change(nodes: Nodes) -> None:
        name = nodes.draft.nodes[str(LOADER[0])]["inputs"]["unet_name"]
        nodes.draft.set(model=nodes.add(class_type, **{"unet_name": name, **given}))

    return change


def another_sampler(class_type: str, **given: Any) -> Change:
    """Sample by another node, whose first output is a latent."""

    def change(nodes: Nodes) -> None:
        nodes.draft.nodes[DECODER]["inputs"]["samples"] = nodes.add(class_type, **given)

    return change


def advanced_control(nodes: Nodes) -> None:
    draft = nodes.draft
    net = nodes.add("ControlNetLoaderAdvanced", cnet=XLABS)
    applied = nodes.add("ACN_AdvancedControlNetApply_v2", control_net=net, vae_optional=VAE)
    draft.set(positive=applied, negative=[applied[0], 1])


def tiled_upscale(nodes: Nodes) -> None:
    draft = nodes.draft
    picture = [DECODER, 0]
    larger = draft.add(
        "ImageScale", image=picture, upscale_method="bilinear", width=256, height=256,
        crop="disabled",
    )  # fmt: skip
    tiles = nodes.add(
        "UltimateSDUpscaleNoUpscale", upscaled_image=larger, denoise=0.5, tile_width=128,
        tile_height=128, steps=2,
    )  # fmt: skip
    draft.nodes["tiles"] = {
        "class_type": "SaveImage",
        "inputs": {"images": tiles, "filename_prefix": "tiles"},
    }


def basic_pipe(nodes: Nodes) -> None:
    sampler = nodes.draft.sampler
    ends = {name: sampler[name] for name in ("model", "positive", "negative")}
    pipe = nodes.add("ToBasicPipe", **ends)
    sampled = nodes.add("ImpactKSamplerBasicPipe", basic_pipe=pipe)
    nodes.draft.nodes[DECODER]["inputs"]["samples"] = [sampled[0], 1]  # after the pipe


def identity(nodes: Nodes) -> None:
    nodes.model(
        "ApplyPulidFlux",
        pulid_flux=nodes.add("PulidFluxModelLoader"),
        eva_clip=nodes.add("PulidFluxEvaClipLoader"),
        face_analysis=nodes.add("PulidFluxInsightFaceLoader"),
    )


def detail_daemon(nodes: Nodes) -> None:
    draft = nodes.draft
    inner = draft.add("KSamplerSelect", sampler_name="euler")
    sampler = nodes.add("DetailDaemonSamplerNode", sampler=inner)
    sigmas = nodes.add("BasicScheduler", steps=4, denoise=1.0)
    another_sampler(
        "SamplerCustom", sampler=sampler, sigmas=sigmas, add_noise=True, noise_seed=31, cfg=1.0
    )(nodes)


PACKS = (
    RealPack("ComfyUI-KJNodes", through("PathchSageAttentionKJ", sage_attention="auto")),
    RealPack("ComfyUI-KJNodes", through("CFGZeroStarAndInit", use_zero_init=False)),
    RealPack("ComfyUI-KJNodes", through("TorchCompileModelFluxAdvancedV2", backend="inductor")),
    RealPack("ComfyUI-TeaCache", through("TeaCache", model_type="flux")),
    RealPack("Comfy-WaveSpeed", through("ApplyFBCacheOnModel", residual_diff_threshold=0.3)),
    RealPack("ComfyUI-GGUF", another_loader("UnetLoaderGGUF", unet_name=GGUF_FILE)),
    RealPack("ComfyUI-Advanced-ControlNet", advanced_control),
    RealPack("ComfyUI-MultiGPU", another_loader("UNETLoaderMultiGPU")),
    RealPack("ComfyUI_UltimateSDUpscale", tiled_upscale),
    RealPack("ComfyUI-Impact-Pack", basic_pipe),
    RealPack("ComfyUI-Inspire-Pack", another_sampler("KSampler //Inspire"), "ComfyUI-Impact-Pack"),
    RealPack("ComfyUI-PuLID-Flux", identity),
    RealPack("ComfyUI-NAG", another_sampler("KSamplerWithNAG", nag_negative=[POSITIVE, 0])),
    RealPack("ComfyUI-DyPE", through("DyPE_FLUX", width=1024, height=1024)),
    RealPack("ComfyUI-Detail-Daemon", detail_daemon),
)
