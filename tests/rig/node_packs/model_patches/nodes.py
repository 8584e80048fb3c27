"""Node packs that hang closures on ComfyUI's patches and wrappers.

Runs in: a ComfyUI process of a test server.

Written for the tests. Every patch here looks at all tokens, so that a shard alone would be wrong.
"""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import torch


class ModelNode:
    """A node that takes a model and returns a model."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}


class PostInput(ModelNode):
    """Tokens are changed, and some are added, before the first block."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def post_input(inputs: dict[str, Any]) -> dict[str, Any]:
            img, txt, ids = inputs["img"], inputs["txt"], inputs["txt_ids"]
            mean = img.mean(dim=1, keepdim=True)
            inputs["img"] = 0.9 * img + 0.1 * mean
            inputs["txt"] = torch.cat((mean.expand(-1, 3, -1), txt), dim=1)
            inputs["txt_ids"] = torch.cat((ids[:, :3], ids), dim=1)
            return inputs

        model.set_model_post_input_patch(post_input)
        return (model,)


class BeforeAttention(ModelNode):
    """``attn1_patch``: queries, keys and values are changed."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def before(q: Any, k: Any, v: Any, extra_options: Any, **_: Any) -> dict[str, Any]:
            first, end = extra_options["img_slice"]
            v = v.clone()
            v[:, :, first:end] += 0.5 * v[:, :, first:end].mean(dim=2, keepdim=True)
            return {"q": 1.2 * q, "k": k, "v": v}

        model.set_model_attn1_patch(before)
        return (model,)


class AfterAttention(ModelNode):
    """``attn1_output_patch``: the result of attention is changed."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def after(out: Any, extra_options: Any) -> Any:
            first, end = extra_options["img_slice"]
            picture = out[:, first:end]
            out[:, first:end] = picture + 0.3 * picture.flip(1)
            return out

        model.set_model_attn1_output_patch(after)
        return (model,)


class FunctionWrapper(ModelNode):
    """``model_function_wrapper``: the call of the model as a whole."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def wrapper(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
            return 0.95 * apply_model(args["input"], args["timestep"] * 0.97, **args["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class DiffusionWrapper(ModelNode):
    """A wrapper around the diffusion model, as core's EasyCache has one."""

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def wrapper(executor: Any, x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return executor(x.flip(-1), *args, **kwargs).flip(-1)

        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        model.add_wrapper(kind, wrapper)
        return (model,)


NODE_CLASS_MAPPINGS = {
    "RigPostInput": PostInput,
    "RigBeforeAttention": BeforeAttention,
    "RigAfterAttention": AfterAttention,
    "RigFunctionWrapper": FunctionWrapper,
    "RigDiffusionWrapper": DiffusionWrapper,
}
