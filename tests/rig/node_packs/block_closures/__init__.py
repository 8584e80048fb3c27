"""Node packs that hang closures around ComfyUI's own blocks.

Runs in: a ComfyUI process of a test server.

Written for the tests; only the mechanism is that of the packs named at each node.
"""

from __future__ import annotations

from typing import Any

import torch

WIDTH = 384  # of the models of the feature rows


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(img: torch.Tensor, seed: int) -> torch.Tensor:
    """Attention of the image tokens to eight fixed ones: what face and image adapters add."""
    faces = noise(seed, 8, WIDTH).to(img)
    return 0.5 * torch.softmax(img @ faces.T / WIDTH**0.5, dim=-1) @ faces


class ModelNode:
    """A node that takes a model and returns a model."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}


class ReplacedBlocks(ModelNode):
    """PuLID_Flux_ll: closures in ``patches_replace``, around ComfyUI's block; needs all tokens."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def double(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            out = extra["original_block"](args)
            img = out["img"]
            out["img"] = img + attend(img, 6) + 0.1 * img.mean(dim=1, keepdim=True)
            return out

        def single(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            out = extra["original_block"](args)
            joint = out["img"]
            first, end = args["transformer_options"].get("img_slice", (256, joint.shape[1]))
            picture = joint[:, first:end]
            joint[:, first:end] = picture + 0.5 * attend(picture, 7)
            return out

        model.set_model_patch_replace(double, "dit", "double_block", 1)
        model.set_model_patch_replace(single, "dit", "single_block", 0)
        return (model,)


class Twice(ModelNode):
    """A closure that runs a block twice, the second time on other tokens and another vector."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def double(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            second = {**args, "img": args["img"].flip(1), "txt": args["txt"].clone()}
            second["vec"] = 0.9 * args["vec"]
            first = extra["original_block"](args)
            other = extra["original_block"](second)
            first["img"] = 0.7 * first["img"] + 0.3 * other["img"].flip(1)
            return first

        model.set_model_patch_replace(double, "dit", "double_block", 0)
        return (model,)


class Counted(ModelNode):
    """A closure that counts its calls, and leaves every third block out."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        calls = [0]

        def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            calls[0] += 1
            return args if calls[0] % 3 == 0 else extra["original_block"](args)

        model.set_model_patch_replace(block, "dit", "double_block", 1)
        model.set_model_patch_replace(block, "dit", "single_block", 1)
        return (model,)


class Hooked(ModelNode):
    """Anything that watches or changes a block through PyTorch's own hooks."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def hook(module: Any, args: Any, output: tuple[Any, Any]) -> tuple[Any, Any]:
            return output[0] * 1.1, output[1]

        model.model.diffusion_model.double_blocks[0].register_forward_hook(hook)
        return (model,)


NODE_CLASS_MAPPINGS = {
    "RigReplacedBlocks": ReplacedBlocks,
    "RigTwice": Twice,
    "RigCounted": Counted,
    "RigHooked": Hooked,
}
