"""The nodes: a step cache, an identity, negative guidance, and a class of its own.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

import types
import unittest.mock
from functools import partial
from typing import Any

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy.ldm.flux.model import Flux

from .loops import all_blocks, embedded

LITTLE = 0.6  # lets one of four steps through
LOOSE = 10.0  # lets the first step through, and of the others the first block
WIDTH = 384  # of the models of the feature rows


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class ModelNode:
    """A node that takes a model and returns a model."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}


def cached_forward(
    self: Any,
    img: Any,
    img_ids: Any,
    txt: Any,
    txt_ids: Any,
    timesteps: Any,
    y: Any,
    guidance: Any = None,
    control: Any = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Leave the blocks out while their modulated input changes little: add the last difference."""
    img, txt, given = embedded(self, img, txt, (img_ids, txt_ids), timesteps, y, guidance)
    first, _ = self.double_blocks[0].img_mod(given["vec"])
    seen = (1 + first.scale) * self.double_blocks[0].img_norm1(img) + first.shift
    self.rig_calls += 1
    if self.rig_calls == 1 or float((seen - self.rig_seen).abs().mean()) > LITTLE:
        self.rig_seen = seen
        before = img.clone()
        img = all_blocks(self, control=control)(img, txt, given)
        self.rig_residual = img - before
    else:
        img = img + self.rig_residual
    return self.final_layer(img, given["vec"])


class StepCache(ModelNode):
    """TeaCache, MagCache: ``forward_orig`` is replaced while the model is called."""

    forward = staticmethod(cached_forward)

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        flux = model.model.diffusion_model

        def wrapper(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
            sigmas = args["c"]["transformer_options"]["sample_sigmas"]
            if bool(torch.isclose(args["timestep"][0].cpu(), sigmas[0].cpu())):
                flux.rig_calls = 0
            own = types.MethodType(self.forward, flux)
            with unittest.mock.patch.multiple(flux, forward_orig=own):
                return apply_model(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


def first_block_forward(
    self: Any,
    img: Any,
    img_ids: Any,
    txt: Any,
    txt_ids: Any,
    timesteps: Any,
    y: Any,
    guidance: Any = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Run the first block; while it changes little, add what the others did the last time."""
    img, txt, given = embedded(self, img, txt, (img_ids, txt_ids), timesteps, y, guidance)
    before = img.clone()
    first = self.double_blocks[0]
    img, txt = first(img=img, txt=txt, **given)
    seen = img - before
    self.rig_calls += 1
    size = float(seen.abs().mean())
    if self.rig_calls == 1 or float((seen - self.rig_seen).abs().mean()) > LOOSE * size:
        self.rig_seen, after_first = seen, img.clone()
        img = all_blocks(self, first=1)(img, txt, given)
        self.rig_residual = img - after_first
    else:
        img = img + self.rig_residual
    return self.final_layer(img, given["vec"])


class FirstBlockCache(StepCache):
    """WaveSpeed on FLUX: ``forward_orig`` is replaced while the model is called."""

    forward = staticmethod(first_block_forward)


def identity_forward(
    self: Any,
    img: Any,
    img_ids: Any,
    txt: Any,
    txt_ids: Any,
    timesteps: Any,
    y: Any,
    guidance: Any = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Attend to an embedding after every double block."""
    img, txt, given = embedded(self, img, txt, (img_ids, txt_ids), timesteps, y, guidance)

    def attend(number: int, img: torch.Tensor) -> torch.Tensor:
        faces = self.rig_identity[number]
        weights = torch.softmax(img @ faces.T / WIDTH**0.5, dim=-1)
        return img + 0.5 * weights @ faces

    return self.final_layer(all_blocks(self, attend)(img, txt, given), given["vec"])


class Identity(ModelNode):
    """PuLID: ``forward_orig`` is replaced on the model itself, for good."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        flux = model.model.diffusion_model
        flux.rig_identity = [noise(index, 8, WIDTH) for index in range(len(flux.double_blocks))]
        flux.forward_orig = types.MethodType(identity_forward, flux)
        return (model,)


def guided_forward(
    negative: torch.Tensor,
    self: Any,
    x: Any,
    timestep: Any,
    context: Any,
    y: Any = None,
    guidance: Any = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Run the blocks for the prompt and for another, and push away from the other."""
    height, width = x.shape[-2:]
    img, img_ids = self.process_img(x)
    results = []
    for text in (context, negative.to(context).expand_as(context)):
        ids = torch.zeros(text.shape[0], text.shape[1], 3)
        tokens, txt, given = embedded(self, img, text, (img_ids, ids), timestep, y, guidance)
        tokens = self.final_layer(all_blocks(self)(tokens, txt, given), given["vec"])
        results.append(tokens)
    out = results[0] + 0.5 * (results[0] - results[1])
    rows, columns = height // 2, width // 2
    out = out.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))
    return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape[0], -1, height, width)


class NegativeGuidance(ModelNode):
    """NAG (the node pack): ``forward`` itself is replaced while the model is called."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        flux = model.model.diffusion_model
        negative = noise(9, 1, 1, flux.params.context_in_dim)

        def wrapper(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
            flux.forward = types.MethodType(partial(guided_forward, negative), flux)
            try:
                return apply_model(args["input"], args["timestep"], **args["c"])
            finally:
                del flux.forward

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class QuieterFlux(Flux):  # type: ignore[misc]
    """FLUX with a ``forward`` of its own, which calls its own copy of ``_forward``."""

    def forward(self, x: Any, timestep: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        function = Flux._forward
        function = getattr(function, "__wrapped__", function)  # a copy lies around nothing
        return function(self, x, timestep, context, *args, **kwargs) * 0.9


class OwnForward(ModelNode):
    """Fluxtapoz: the model's class is changed to one with a ``forward`` of its own, for good."""

    def change(self, model: Any) -> tuple[Any]:
        model.model.diffusion_model.__class__ = QuieterFlux
        return (model,)


class Positions(torch.nn.Module):
    """Positions that lie closer together."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids * 0.5)


class OwnPositions(ModelNode):
    """DyPE: an object patch is another ``pe_embedder``."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        positions = Positions(model.get_model_object("diffusion_model.pe_embedder"))
        model.add_object_patch("diffusion_model.pe_embedder", positions)
        return (model,)


class OwnFlux(Flux):  # type: ignore[misc]
    """FLUX whose image tokens are mixed with their mean before the blocks."""

    def forward_orig(self, img: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward_orig(
            0.9 * img + 0.1 * img.mean(dim=1, keepdim=True), *args, **kwargs
        )


class OwnBlock(DoubleStreamBlock):  # type: ignore[misc]
    """A block that strengthens what it did to the image."""

    def forward(self, img: Any, txt: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        before = img.clone()
        img, txt = super().forward(img, txt, *args, **kwargs)
        return img + 0.2 * (img - before), txt


class OwnClasses(ModelNode):
    """RES4LYF: the classes of the model and of its blocks are object patches."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        model.add_object_patch("diffusion_model.__class__", OwnFlux)
        for index in range(len(model.model.diffusion_model.double_blocks)):
            key = f"diffusion_model.double_blocks.{index}.__class__"
            model.add_object_patch(key, OwnBlock)
        return (model,)


NODE_CLASS_MAPPINGS = {
    "RigStepCache": StepCache,
    "RigFirstBlockCache": FirstBlockCache,
    "RigOwnForward": OwnForward,
    "RigOwnPositions": OwnPositions,
    "RigIdentity": Identity,
    "RigNegativeGuidance": NegativeGuidance,
    "RigOwnClasses": OwnClasses,
}
