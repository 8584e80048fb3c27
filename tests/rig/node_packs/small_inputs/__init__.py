"""Small stand-ins for what nodes make with large files: styles, prompts, and pictures of latents.

Runs in: a ComfyUI process of a test server.

Redux and USO read files whose widths ComfyUI hard-codes (SigLIP, 1152; FLUX, 3072 and 4096). Only
these objects are made here; StyleModelApply and USOStyleReference are ComfyUI's own.
"""

from __future__ import annotations

import zlib
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy_extras.nodes_model_patch import SigLIPMultiFeatProjModel

TEXT_WIDTH, HIDDEN = 128, 384
NUM_TOKENS, WIDTH, LAYERS, STYLE_TOKENS = 25, 32, 27, 9


def vision_output(seed: int) -> Any:
    """Return what a vision model says of a picture."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, LAYERS, NUM_TOKENS, WIDTH, generator=generator)
    output = comfy.clip_vision.Output()
    output["last_hidden_state"] = states[:, -1]
    output["penultimate_hidden_states"] = states[:, -2]
    output["all_hidden_states"] = states
    return output


class Style:
    """What StyleModelApply needs of a style model."""

    def __init__(self, seed: int) -> None:
        self.weight = torch.randn(WIDTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))

    def get_cond(self, output: Any) -> torch.Tensor:
        """Return the tokens that are appended to the prompt."""
        return output["last_hidden_state"] @ self.weight / WIDTH**0.5


class SmallStyle:
    """A style model, and what a vision model says of a picture."""

    RETURN_TYPES = ("STYLE_MODEL", "CLIP_VISION_OUTPUT")
    FUNCTION = "make"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {}}

    def make(self) -> tuple[Any, Any]:
        return Style(1), vision_output(2)


class SmallStyleProjector:
    """A model patch as ModelPatchLoader makes it of USO's file, and a vision output."""

    RETURN_TYPES = ("MODEL_PATCH", "CLIP_VISION_OUTPUT")
    FUNCTION = "make"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {}}

    def make(self) -> tuple[Any, Any]:
        model = SigLIPMultiFeatProjModel(
            siglip_token_nums=NUM_TOKENS,
            style_token_nums=STYLE_TOKENS,
            siglip_token_dims=WIDTH,
            hidden_size=HIDDEN,
            operations=comfy.ops.manual_cast,
        )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = parameter.shape[-1] ** -0.5 if name.endswith("weight") else 0.1
                values = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(values + ("norm.weight" in name))
        patcher = comfy.model_patcher.ModelPatcher(
            model,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        return patcher, vision_output(4)


class SmallPrompt:
    """A prompt for models whose text encoder is large: tokens drawn from the text's own seed."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        sizes = {"width": ("INT", {"default": TEXT_WIDTH}), "num_tokens": ("INT", {"default": 40})}
        return {"required": {"text": ("STRING", {"default": ""}), **sizes}}

    def make(self, text: str, width: int, num_tokens: int) -> tuple[Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        tokens = torch.randn(1, num_tokens, width, generator=generator)
        return ([[tokens, {"pooled_output": torch.zeros(1, TEXT_WIDTH)}]],)


class SmallDecode:
    """A picture of a latent of any number of channels, for models whose VAE is large."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"samples": ("LATENT",)}}

    def make(self, samples: dict[str, Any]) -> tuple[Any]:
        latent = samples["samples"].float()
        channels = latent.shape[1]
        mix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(5)) / channels**0.5
        picture = torch.einsum("bchw,cd->bhwd", latent, mix)
        picture = (picture - picture.mean()) / picture.std()
        return ((0.5 + 0.2 * picture).clamp(0, 1),)


NODE_CLASS_MAPPINGS = {
    "SmallStyle": SmallStyle,
    "SmallStyleProjector": SmallStyleProjector,
    "SmallPrompt": SmallPrompt,
    "SmallDecode": SmallDecode,
}
