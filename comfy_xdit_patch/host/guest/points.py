"""The table of every attribute of ComfyUI that we touch. docs/patch-points.md is made from it.

Runs in: host process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_xdit_patch.host.guest.patchset import PatchPoint
from comfy_xdit_patch.host.guest.wrappers import Wrappers


def sampling_points(wrappers: Wrappers) -> tuple[PatchPoint, ...]:
    """The points that make sampling parallel: all of them or none."""
    return (
        PatchPoint(
            "comfy.ldm.flux.model",
            "Flux._forward",
            wrappers.flux_forward,
            frozenset({"x", "timestep", "context", "transformer_options"}),
            "The narrowest place that every FLUX call of every sampler crosses: after all of "
            "ComfyUI's own wrappers ran, before tokens exist. The payload is the latent.",
            hidden_from_dynamo=True,
        ),
        PatchPoint(
            "comfy.ldm.chroma.model",
            "Chroma._forward",
            wrappers.flux_forward,
            frozenset({"x", "timestep", "context", "transformer_options"}),
            "The same for Chroma.",
            hidden_from_dynamo=True,
        ),
        PatchPoint(
            "comfy.ldm.chroma_radiance.model",
            "ChromaRadiance._forward",
            wrappers.flux_forward,
            frozenset({"x", "timestep", "context", "transformer_options"}),
            "The same for Chroma Radiance.",
            hidden_from_dynamo=True,
        ),
        PatchPoint(
            "comfy.model_base",
            "BaseModel._apply_model",
            wrappers.apply_model,
            frozenset({"x", "t"}),
            "Tells the forward below which BaseModel and which current ModelPatcher it belongs to.",
        ),
        PatchPoint(
            "comfy.samplers",
            "CFGGuider.outer_sample",
            wrappers.outer_sample,
            frozenset({"noise", "sigmas"}),
            "Begin and end of a sampling run: a lost worker keeps the rest of the run on one GPU, "
            "and the end says one line.",
        ),
        PatchPoint(
            "comfy.sd",
            "load_diffusion_model",
            wrappers.load_diffusion_model,
            frozenset({"unet_path", "model_options"}),
            "Which file a model came from, so that the workers load the same one. Starts the "
            "workers while ComfyUI goes on with the text encoder.",
            only_notes=True,
        ),
        PatchPoint(
            "comfy.sd",
            "load_checkpoint_guess_config",
            wrappers.load_checkpoint,
            frozenset({"ckpt_path", "output_model", "model_options"}),
            "The same for checkpoints.",
            only_notes=True,
        ),
        PatchPoint(
            "comfy.model_management",
            "free_memory",
            wrappers.free_memory,
            frozenset({"memory_required", "device"}),
            "When ComfyUI needs room for a text encoder or a VAE, the worker on that GPU gives its "
            "memory back; Free, Unload and --disable-smart-memory reach every worker.",
        ),
        PatchPoint(
            "comfy.model_management",
            "load_models_gpu",
            wrappers.load_models,
            frozenset({"models", "memory_required"}),
            "What ComfyUI wants to compute with, without the weights: a worker need not leave for "
            "weights that dynamic VRAM passes through the room that there is.",
        ),
        PatchPoint(
            "comfy.model_patcher",
            "ModelPatcher.partially_load",
            wrappers.partially_load,
            frozenset({"device_to", "extra_memory"}),
            "A FLUX model that a worker on the same GPU runs is not loaded there a second time. "
            "ComfyUI's copy stays in RAM, as with --novram, and is still complete.",
        ),
        PatchPoint(
            "comfy.model_patcher",
            "ModelPatcher.patch_hooks",
            wrappers.patch_hooks,
            frozenset({"hooks"}),
            "While the workers run a model, what hooks would write into ComfyUI's own copy of its "
            "weights is left out, and made up for before ComfyUI's own forward runs.",
        ),
    )


def decode_points(wrappers: Wrappers) -> tuple[PatchPoint, ...]:
    """The points that decode latents on the ranks; without them ComfyUI decodes them."""
    return (
        PatchPoint(
            "comfy.ldm.modules.diffusionmodules.model",
            "Decoder.forward",
            wrappers.decode,
            frozenset({"z"}),
            "The narrowest place that every decoding of a FLUX latent crosses, whole or in tiles: "
            "after ComfyUI has loaded the VAE and made room. The payload is the latent.",
        ),
        PatchPoint(
            "comfy.sd",
            "VAE.decode_tiled_",
            wrappers.decode_tiled,
            frozenset({"samples", "tile_x", "tile_y", "overlap"}),
            "Begin and end of decoding in tiles, by the node for it or for want of memory.",
        ),
        PatchPoint(
            "comfy.utils",
            "tiled_scale",
            wrappers.tiled_scale,
            frozenset({"samples", "function", "output_device", "pbar"}),
            "Which tiles ComfyUI is about to decode one by one, so that ranks decode several at "
            "once. It cuts and blends them itself.",
        ),
    )


def control_points(wrappers: Wrappers) -> tuple[PatchPoint, ...]:
    """The points that run ControlNets on the ranks; without these points ComfyUI runs them."""
    return (
        PatchPoint(
            "comfy.ldm.flux.controlnet",
            "ControlNetFlux.forward",
            wrappers.control_forward,
            frozenset({"x", "timesteps", "context", "hint"}),
            "A ControlNet on one GPU keeps the others waiting, and its residuals would have to be "
            "carried to them in every step.",
        ),
        PatchPoint(
            "comfy.controlnet",
            "load_controlnet",
            wrappers.load_controlnet,
            frozenset({"ckpt_path", "model_options"}),
            "Which file a ControlNet came from, so that the workers load the same one.",
            only_notes=True,
        ),
    )


def execution_points(wrappers: Wrappers) -> tuple[PatchPoint, ...]:
    """The point that makes one line in the log of all sampling runs of a prompt."""
    return (
        PatchPoint(
            "execution",
            "PromptExecutor.execute",
            wrappers.execute_prompt,
            frozenset(),
            "Begin and end of a prompt: one line in the log for all of its sampling runs, and what "
            "a node kept from being heard is said.",
        ),
    )


def server_points(add_routes: Callable[..., Any]) -> tuple[PatchPoint, ...]:
    """The point that lets ComfyUI's own server answer our routes, as ``GET /xdit/status``."""
    return (
        PatchPoint(
            "server",
            "PromptServer.add_routes",
            add_routes,
            frozenset(),
            "Adds /xdit/status, /xdit/metrics, /xdit/settings, /xdit/measure and the panel's files "
            "to ComfyUI's server before its routes are fixed.",
        ),
    )
