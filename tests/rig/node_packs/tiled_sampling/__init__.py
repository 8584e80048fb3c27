"""A node pack that samples tile by tile, and mutes all logging meanwhile: UltimateSDUpscale does.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

import logging
from typing import Any

import nodes
import torch


class TiledSampler:
    """A KSampler for each half of the latent."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        inputs: dict[str, Any] = nodes.KSampler.INPUT_TYPES()
        return inputs

    def sample(self, model: Any, latent_image: Any, **inputs: Any) -> tuple[Any]:
        logger = logging.getLogger()
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            tiles = [
                nodes.KSampler().sample(model=model, latent_image={"samples": tile}, **inputs)
                for tile in latent_image["samples"].chunk(2, dim=-1)
            ]
        finally:
            logger.setLevel(level)
        return ({"samples": torch.cat([tile["samples"] for (tile,) in tiles], dim=-1)},)


class CountingAttention:
    """A patch that keeps something between calls: these steps fall back."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        calls = [0]

        def counted(func: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return func(*args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = counted
        return (model,)


NODE_CLASS_MAPPINGS = {
    "RigTiledSampler": TiledSampler,
    "RigCountingAttention": CountingAttention,
}
