"""Node packs that put blocks of their own in the place of FLUX's.

Runs in: a ComfyUI process of a test server.

Written for the tests; only the mechanism is that of the packs named at each node.
"""

from __future__ import annotations

import unittest.mock
from typing import Any

import comfy_api.torch_helpers
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


class CachedBlocks(torch.nn.Module):
    """All double blocks as one: while the first changes little, the rest is not run."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)
        self.calls = 0
        self.rest: Any = None

    def forward(self, img: Any, txt: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        img, txt = self.blocks[0](img=img, txt=txt, **kwargs)
        if self.calls % 2 == 0:
            return img + self.rest, txt
        before = img.clone()
        for block in self.blocks[1:]:
            img, txt = block(img=img, txt=txt, **kwargs)
        self.rest = img - before
        return img, txt


class FirstBlockCache(ModelNode):
    """WaveSpeed: the list of blocks is replaced while the model is called."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        flux = model.model.diffusion_model
        made: dict[str, Any] = {}

        def wrapper(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
            sigmas = args["c"]["transformer_options"]["sample_sigmas"]
            if bool(torch.isclose(args["timestep"][0].cpu(), sigmas[0].cpu())):
                made["blocks"] = torch.nn.ModuleList([CachedBlocks(flux.double_blocks)])
            with unittest.mock.patch.object(flux, "double_blocks", made["blocks"]):
                return apply_model(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class AdapterBlock(torch.nn.Module):
    """A block that runs ComfyUI's and adds attention to an image prompt."""

    def __init__(self, block: Any, seed: int) -> None:
        super().__init__()
        self.block, self.seed = block, seed

    def forward(self, img: Any, txt: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        img, txt = self.block(img, txt, *args, **kwargs)
        return img + attend(img, self.seed), txt


class Adapter(ModelNode):
    """IPAdapter-Flux: every double block is an object patch."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        for index, block in enumerate(model.model.diffusion_model.double_blocks):
            key = f"diffusion_model.double_blocks.{index}"
            model.add_object_patch(key, AdapterBlock(block, index))
        return (model,)


class ProcessedBlock(torch.nn.Module):
    """A block that leaves its work to a processor, which can be exchanged."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block, self.processor = block, None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        assert self.processor is not None
        return self.processor(self.block, *args, **kwargs)


def processor(block: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    img, txt = block(*args, **kwargs)
    return img + 0.5 * attend(img, 5), txt


class Processor(ModelNode):
    """XLabs: blocks with a processor, and the processor itself an object patch."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        block = ProcessedBlock(model.model.diffusion_model.double_blocks[0])
        block.processor = processor
        model.add_object_patch("diffusion_model.double_blocks.0", block)
        return (model,)


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


class Hooked(ModelNode):
    """Anything that watches or changes a block through PyTorch's own hooks."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def hook(module: Any, args: Any, output: tuple[Any, Any]) -> tuple[Any, Any]:
            return output[0] * 1.1, output[1]

        model.model.diffusion_model.double_blocks[0].register_forward_hook(hook)
        return (model,)


class CompiledBlocks(ModelNode):
    """KJNodes: each block is compiled through ComfyUI's helper."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        keys = ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.1"]
        comfy_api.torch_helpers.set_torch_compile_wrapper(model, backend="eager", keys=keys)
        return (model,)


class CompiledModel(ModelNode):
    """WaveSpeed's and TeaCache's compile nodes: the compiled model is an object patch."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        compiled = torch.compile(model.get_model_object("diffusion_model"), backend="eager")
        model.add_object_patch("diffusion_model", compiled)
        return (model,)


NODE_CLASS_MAPPINGS = {
    "RigFirstBlockCache": FirstBlockCache,
    "RigAdapter": Adapter,
    "RigProcessor": Processor,
    "RigReplacedBlocks": ReplacedBlocks,
    "RigHooked": Hooked,
    "RigCompiledBlocks": CompiledBlocks,
    "RigCompiledModel": CompiledModel,
}
