"""Mistakes: prompts of another model's, packs of another time, and weights edited in place.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch


class OtherEncoder:
    """A prompt as a text encoder of another family makes it: its tokens have another width."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def change(self, conditioning: Any) -> tuple[Any]:
        return ([[tokens[..., :-8], options] for tokens, options in conditioning],)


class ModelNode:
    """A node that takes a model and returns a model."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}


def with_forward(model: Any, forward: Callable[..., Any]) -> Any:
    """Have ``forward_orig`` be another one while the model is called, as MagCache does."""
    model = model.clone()
    flux = model.model.diffusion_model

    def wrapper(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        with unittest.mock.patch.multiple(flux, forward_orig=types.MethodType(forward, flux)):
            return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


class OldPack(ModelNode):
    """A pack for an earlier ComfyUI, which gave the forward fewer arguments."""

    def change(self, model: Any) -> tuple[Any]:
        def forward(flux: Any, img: Any, img_ids: Any, txt: Any, txt_ids: Any) -> Any:
            raise AssertionError("it cannot be called")

        return (with_forward(model, forward),)


class NumberedNode(ModelNode):
    """A node that ComfyUI runs again for another number."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",), "seed": ("INT", {"default": 0, "max": 2**62})}}


class EarlyError(NumberedNode):
    """A pack that raises in its own code, and says how often it was called."""

    def change(self, model: Any, seed: int) -> tuple[Any]:
        calls = []

        def forward(flux: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            raise LookupError(f"no such block, call {len(calls)}")

        return (with_forward(model, forward),)


class LateError(ModelNode):
    """A pack that raises after it has called a part of the model."""

    def change(self, model: Any) -> tuple[Any]:
        def forward(flux: Any, img: Any, *args: Any, **kwargs: Any) -> Any:
            raise LookupError(f"no place for {flux.img_in(img).shape[1]} tokens")

        return (with_forward(model, forward),)


def element(weight: torch.Tensor, place: int) -> torch.Tensor:
    return weight.reshape(-1)[place % weight.numel() :][:1]


def row(weight: torch.Tensor, place: int) -> torch.Tensor:
    return weight[place % weight.shape[0]]


def column(weight: torch.Tensor, place: int) -> torch.Tensor:
    return weight[..., place % weight.shape[-1]]


def head(weight: torch.Tensor, place: int) -> torch.Tensor:
    size = max(1, weight.shape[0] // 8)
    return weight[place % 8 * size :][:size]


def block(weight: torch.Tensor, place: int) -> torch.Tensor:
    rows = weight[: weight.shape[0] // 2 + 1]
    return rows if weight.ndim == 1 else rows[..., : weight.shape[-1] // 2 + 1]


PARTS = (element, row, column, head, block)


def with_no_grad(part: torch.Tensor) -> None:
    with torch.no_grad():
        part.mul_(-3.0)


def through_data(part: torch.Tensor) -> None:
    part.data.add_(0.5)


def through_numpy(part: torch.Tensor) -> None:
    if part.dtype == torch.bfloat16:  # which NumPy has not
        bits = part.detach().view(torch.int16).numpy()
        bits ^= 64
    else:
        part.detach().numpy()[...] *= -3.0


WAYS = (with_no_grad, through_data, through_numpy)


class EditWeights(NumberedNode):
    """Edit a part of one of the model's weights where it lies: which and how, ``seed`` says."""

    def change(self, model: Any, seed: int) -> tuple[Any]:
        weights = sorted(model.model.diffusion_model.named_parameters())
        place, number = divmod(seed, len(weights) * len(PARTS) * len(WAYS))
        number, way = divmod(number, len(WAYS))
        number, part = divmod(number, len(PARTS))
        WAYS[way](PARTS[part](weights[number][1], place))
        return (model.clone(),)


NODE_CLASS_MAPPINGS = {
    "RigOtherEncoder": OtherEncoder,
    "RigOldPack": OldPack,
    "RigEarlyError": EarlyError,
    "RigLateError": LateError,
    "RigEditWeights": EditWeights,
}
