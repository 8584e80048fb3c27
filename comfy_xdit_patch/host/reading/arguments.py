"""Whether the arguments of a call are such as the workers can be given.

Runs in: host. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_xdit_patch.errors import Refusal, Scope

# ComfyUI's FLUX reads "input" and "output"; "middle" is always there and never read.
CARRIED_CONTROLS = ("input", "middle", "output")
NEEDED = ("x", "timestep", "context")
TENSORS = (*NEEDED, "y", "guidance", "attention_mask")
MAPPINGS = ("control", "transformer_options")


def check_arguments(arguments: Mapping[str, Any]) -> list[Refusal]:
    """See whether the workers can be given everything that this call's result depends on.

    ``Flux._forward`` takes other keyword arguments than the carried ones and does not read them.
    ``host/reading/node_patches.py`` looks at what nodes set in ``transformer_options``.
    """
    found = []
    if "multigpu_thread_device" in (arguments.get("transformer_options") or {}):
        found.append(Refusal("ComfyUI's own MultiGPU split is active", Scope.STEP))
    found += [
        Refusal(f"a ControlNet has {name} residuals", Scope.STEP)
        for name in arguments.get("control") or ()
        if name not in CARRIED_CONTROLS
    ]
    return found


def misplaced(arguments: Mapping[str, Any]) -> Refusal | None:
    """See whether an argument is what its name says.

    Their order differs between ComfyUI versions, and packs pass them on by position.
    """
    import torch

    kinds = {name: torch.Tensor for name in TENSORS} | dict.fromkeys(MAPPINGS, Mapping)
    for name, kind in kinds.items():
        value = arguments.get(name)
        is_absent = value is None and name not in NEEDED
        is_control = name != "control" or _is_control(value)
        if not (is_absent or (isinstance(value, kind) and is_control)):
            return _other(name, value)
    references = arguments.get("ref_latents")
    is_list = isinstance(references, (list, tuple))
    if references is not None and not (
        is_list and all(isinstance(reference, torch.Tensor) for reference in references)
    ):
        return _other("ref_latents", references)
    return None


def check_grad(x: Any) -> list[Refusal]:
    """See whether this is training: gradients do not cross processes."""
    import torch

    if torch.is_grad_enabled() and x.requires_grad:
        return [Refusal("gradients are wanted", Scope.STEP)]
    return []


def _is_control(value: Any) -> bool:
    """Whether each entry is a list of residuals, as ControlNets leave them."""
    return value is None or all(
        isinstance(residuals, (list, tuple)) for residuals in getattr(value, "values", tuple)()
    )


def _other(name: str, value: Any) -> Refusal:
    entries = f" of {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
    what = f"{type(value).__name__}{entries}"
    return Refusal(f"a node called the model with a {what} as its {name}", Scope.STEP)
