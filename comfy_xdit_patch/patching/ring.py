"""Whether a call's attention can go round a ring.

Runs in: host process. Reads ComfyUI's objects, changes nothing.

A ring joins parts of attention by their log-sum-exp, which no attention function of ComfyUI's
returns; torch's own kernels run in its place (docs/adr/0014). That is the same up to rounding for
functions that are exact, and something else for those that are not, or that somebody chose.
"""

from __future__ import annotations

from comfy_xdit_patch.errors import Refusal, Scope

EXACT = {
    "attention_basic",
    "attention_flash",
    "attention_pytorch",
    "attention_split",
    "attention_sub_quad",
    "attention_xformers",
}


def no_ring(*, is_overridden: bool = False, is_prescribed: bool = False) -> Refusal | None:
    """Return why a ring must not be used, or None.

    Args:
        is_overridden: a node chose the attention function of this call.
        is_prescribed: the checkpoint names one for some blocks.
    """
    import comfy.ldm.flux.math

    if is_overridden:
        return Refusal("a node chose the attention function, which a ring cannot use", Scope.STEP)
    if is_prescribed:
        return Refusal("the checkpoint prescribes its attention, which a ring cannot use")
    name = comfy.ldm.flux.math.optimized_attention.__name__
    if name not in EXACT:
        return Refusal(f"ComfyUI was started with {name}, which a ring cannot use", Scope.STEP)
    return None
