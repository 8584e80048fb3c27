"""A node pack whose ControlNets multiply what they give by a mask, as Advanced-ControlNet's do.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.controlnet import ControlNet

PATCH = 2


class MaskedControl(ControlNet):  # type: ignore[misc]
    """ComfyUI's ControlNet with a mask on its residuals."""

    mask: torch.Tensor

    @classmethod
    def around(cls, net: ControlNet, mask: torch.Tensor) -> MaskedControl:
        made = ControlNet.copy(net)
        made.__class__ = cls
        made.mask = mask
        return made

    def copy(self) -> MaskedControl:
        return MaskedControl.around(self, self.mask)

    def get_control(self, x_noisy: torch.Tensor, *args: Any) -> Any:
        control = super().get_control(x_noisy, *args)
        if control is None:
            return None
        size = [(length + PATCH - 1) // PATCH for length in x_noisy.shape[-2:]]
        mask = torch.nn.functional.interpolate(self.mask[None], size=size, mode="bilinear")
        mask = mask.reshape(1, -1, 1).to(x_noisy)
        return {
            kind: [None if tensor is None else tensor * mask for tensor in tensors]
            for kind, tensors in control.items()
        }


class MaskedControlNode:
    """Put a mask on a ControlNet."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "change"
    CATEGORY = "rig"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {"required": {"control_net": ("CONTROL_NET",), "mask": ("MASK",)}}

    def change(self, control_net: Any, mask: torch.Tensor) -> tuple[Any]:
        return (MaskedControl.around(control_net, mask),)


NODE_CLASS_MAPPINGS = {"RigMaskedControl": MaskedControlNode}
