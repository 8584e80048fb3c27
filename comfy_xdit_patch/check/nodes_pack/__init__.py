"""Nodes for the check: conditioning without a text encoder, and a clock for steps.

Runs in: the ComfyUI processes that the check starts, which load a copy of this folder.
"""

from __future__ import annotations

import time
from typing import Any

TIMES_S: list[float] = []
"""When steps were done, since the last reading: one prompt runs at a time."""


class XditCheckConditioning:
    """Make random text tokens and a random pooled output, the same for the same seed."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "xdit check"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Say what ComfyUI may pass."""
        number = ("INT", {"default": 1, "min": 0, "max": 1 << 31})
        return {"required": dict.fromkeys(("tokens", "width", "pooled_width", "seed"), number)}

    def make(self, tokens: int, width: int, pooled_width: int, seed: int) -> tuple[Any]:
        """Draw both on the CPU, where text encoders leave theirs."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, width, generator=generator)
        pooled = torch.randn(1, pooled_width, generator=generator)
        return ([[text, {"pooled_output": pooled}]],)


class XditCheckClock:
    """Note when each step of a model has been computed."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "attach"
    CATEGORY = "xdit check"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Say what ComfyUI may pass."""
        return {"required": {"model": ("MODEL",)}}

    def attach(self, model: Any) -> tuple[Any]:
        """Have ComfyUI's sampler call the clock behind each call of the model."""
        import torch

        def note(given: dict[str, Any]) -> Any:
            # Kernels run behind the CPU: without this wait, one step's time would be another's.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            TIMES_S.append(time.monotonic())
            return given["denoised"]

        clocked = model.clone()
        clocked.set_model_sampler_post_cfg_function(note)
        return (clocked,)


class XditCheckTimes:
    """Put the clock's times into the prompt's history, and forget them."""

    RETURN_TYPES = ()
    FUNCTION = "read"
    OUTPUT_NODE = True
    CATEGORY = "xdit check"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Say what ComfyUI may pass; the latent is there to be waited for."""
        return {"required": {"samples": ("LATENT",)}}

    def read(self, samples: Any) -> dict[str, Any]:
        """Return the times, in seconds of a clock that only goes forward."""
        noted = list(TIMES_S)
        TIMES_S.clear()
        return {"ui": {"times_s": noted}}


NODE_CLASS_MAPPINGS = {
    "XditCheckConditioning": XditCheckConditioning,
    "XditCheckClock": XditCheckClock,
    "XditCheckTimes": XditCheckTimes,
}
