"""Node packs that put blocks of their own in the place of FLUX's.

Runs in: a ComfyUI process of a test server.

Written for the tests; only the mechanism is that of the packs named at each node.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from typing import Any

import comfy.ldm.flux.math
import comfy_api.torch_helpers
import torch

WIDTH = 384  # of the models of the feature rows


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(img: torch.Tensor, seed: int) -> torch.Tensor:
    """Attention of the image tokens to eight fixed ones: what face and image adapters add."""
    faces = noise(seed, 8, WIDTH).to(img)
    return 0.5 * torch.softmax(img @ faces.T / WIDTH**0.5, dim=-1) @ faces


def own_forward(
    layers: Any, img: Any, txt: Any, vec: Any, pe: Any, extra: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Compute a double block from its layers; ``extra`` is added to the image's attention."""
    streams = ((txt, "txt"), (img, "img"))
    mods = {name: getattr(layers, f"{name}_mod")(vec) for _, name in streams}
    parts: list[list[torch.Tensor]] = [[], [], []]
    for tokens, name in streams:
        attention_layer, first = getattr(layers, f"{name}_attn"), mods[name][0]
        normed = (1 + first.scale) * getattr(layers, f"{name}_norm1")(tokens) + first.shift
        q, k, v = attention_layer.qkv(normed).unflatten(-1, (3, layers.num_heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        for part, value in zip(parts, (*attention_layer.norm(q, k, v), v), strict=True):
            part.append(value)
    q, k, v = (torch.cat(part, dim=2) for part in parts)
    joint = comfy.ldm.flux.math.attention(q, k, v, pe=pe, mask=None)
    results = []
    for (tokens, name), out in zip(
        streams, joint.split([txt.shape[1], img.shape[1]], 1), strict=True
    ):
        first, second = mods[name]
        out = out + extra(out) if name == "img" else out
        tokens = tokens + first.gate * getattr(layers, f"{name}_attn").proj(out)
        normed = (1 + second.scale) * getattr(layers, f"{name}_norm2")(tokens) + second.shift
        results.append(tokens + second.gate * getattr(layers, f"{name}_mlp")(normed))
    return results[1], results[0]


class ModelNode:
    """A node that takes a model and returns a model."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}


def own_block(model: Any, index: int) -> Any:
    """Return ComfyUI's block, also while the patches of the graph before are still applied."""
    key = f"diffusion_model.double_blocks.{index}"
    return model.object_patches_backup.get(key) or model.model.get_submodule(key)


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


class BlocksAsOne(ModelNode):
    """WaveSpeed on models that it does not know: the list of blocks is replaced in each call."""

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
    """A block with ComfyUI's layers and a forward of its own, which attends to a picture too."""

    def __init__(self, block: Any, seed: int) -> None:
        super().__init__()
        self.layers, self.seed = block, seed

    def forward(self, img: Any, txt: Any, vec: Any, pe: Any, **_: Any) -> tuple[Any, Any]:
        return own_forward(self.layers, img, txt, vec, pe, lambda out: attend(out, self.seed))


class Adapter(ModelNode):
    """IPAdapter-Flux: every double block is an object patch."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        for index in range(len(model.model.diffusion_model.double_blocks)):
            key = f"diffusion_model.double_blocks.{index}"
            model.add_object_patch(key, AdapterBlock(own_block(model, index), index))
        return (model,)


class WrappingBlock(torch.nn.Module):
    """A block that runs ComfyUI's and adds attention to a picture."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, img: Any, txt: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        img, txt = self.block(img, txt, *args, **kwargs)
        return img + attend(img, 8), txt


class Wrapping(ModelNode):
    """An object patch that is a block around ComfyUI's."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        block = WrappingBlock(own_block(model, 1))
        model.add_object_patch("diffusion_model.double_blocks.1", block)
        return (model,)


class ProcessedBlock(torch.nn.Module):
    """A block that leaves its work to a processor, which can be exchanged."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.layers, self.processor = block, None

    def forward(self, img: Any, txt: Any, vec: Any, pe: Any, **_: Any) -> tuple[Any, Any]:
        assert self.processor is not None
        return self.processor(self.layers, img, txt, vec, pe)


def processor(layers: Any, img: Any, txt: Any, vec: Any, pe: Any) -> tuple[Any, Any]:
    return own_forward(layers, img, txt, vec, pe, lambda out: 0.5 * attend(out, 5))


class Processor(ModelNode):
    """XLabs: blocks with a processor."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        block = ProcessedBlock(own_block(model, 0))
        block.processor = processor
        model.add_object_patch("diffusion_model.double_blocks.0", block)
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
    "RigBlocksAsOne": BlocksAsOne,
    "RigAdapter": Adapter,
    "RigWrapping": Wrapping,
    "RigProcessor": Processor,
    "RigCompiledBlocks": CompiledBlocks,
    "RigCompiledModel": CompiledModel,
}
