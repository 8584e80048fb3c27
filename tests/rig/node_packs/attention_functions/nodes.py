"""Node packs that choose another attention function through ComfyUI's extension point.

Runs in: a ComfyUI process of a test server.

Written for the tests; only the mechanism is that of the packs named at each node.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad, wrap_attn


class Override:
    """A node that sets ``optimized_attention_override``."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"model": ("MODEL",)}}

    def change(self, model: Any) -> tuple[Any]:
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = self.override()
        return (model,)

    def override(self) -> Any:
        raise NotImplementedError


def backend_of(kind: str) -> Any:
    """Choose a kernel as packs do that have several: each is a local function of the same name."""
    if kind == "whole":

        def kernel(q: Any, k: Any, v: Any, heads: int, *, mask: Any = None, **_: Any) -> Any:
            return attention_pytorch(q, k, v, heads, mask=mask, skip_reshape=True)

    else:

        def kernel(q: Any, k: Any, v: Any, heads: int, *, mask: Any = None, **_: Any) -> Any:
            return attention_sub_quad(q, k, v, heads, mask=mask, skip_reshape=True)

    kernel = torch.compiler.disable()(kernel)

    @wrap_attn  # type: ignore[untyped-decorator]
    def attention(q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any) -> Any:
        return kernel(q, k, v, heads, mask=mask, **kwargs)

    return attention


class OtherBackend(Override):
    """KJNodes' sage and flash attention: a closure around an attention function of the pack's."""

    def override(self) -> Any:
        backend = backend_of("parts")

        def attention_override(func: Any, *args: Any, **kwargs: Any) -> Any:
            return backend.__wrapped__(*args, **kwargs)

        return attention_override


class Sharpened(Override):
    """A closure of unknown meaning, which changes what attention is given."""

    def override(self) -> Any:
        def sharpened(func: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
            return func(q * 1.3, *args, **kwargs)

        return sharpened


class ShiftedTokens(Override):
    """A closure that looks at all tokens at once, so that a shard alone would be wrong."""

    def override(self) -> Any:
        def shifted(func: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            return func(q, k, v + 0.5 * v.mean(dim=-2, keepdim=True), *args, **kwargs)

        return shifted


class Counting(Override):
    """A closure that keeps count of its calls, so that it cannot be run anywhere else."""

    def override(self) -> Any:
        calls = [0]

        def counting(func: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return func(q * (1.4 if calls[0] % 2 else 0.8), *args, **kwargs)

        return counting


NODE_CLASS_MAPPINGS = {
    "RigOtherBackend": OtherBackend,
    "RigSharpened": Sharpened,
    "RigShiftedTokens": ShiftedTokens,
    "RigCounting": Counting,
}
