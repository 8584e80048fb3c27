"""A call of a model that is there, as the planner's numbers.

Runs in: host. Reads ComfyUI's objects, changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_xdit_patch.planning.job import Job
from comfy_xdit_patch.planning.model_shape import EMBEDDING_WIDTH, ModelShape, Precision
from comfy_xdit_patch.planning.plan import Workload

if TYPE_CHECKING:
    import torch

NUM_STEPS = 20
"""No plan that ``auto`` may take depends on it."""


def job_of(flux: Any, workload: Workload, *, num_bytes: int, dtype: torch.dtype) -> Job:
    """Describe one call.

    Args:
        flux: ComfyUI's model of the FLUX family.
        num_bytes: of its weights as they are stored.
        dtype: that it computes in.
    """
    shape = _shape(flux)
    return Job(
        shape=shape,
        workload=workload,
        precision=Precision("observed", num_bytes / shape.num_weights, False, dtype.itemsize),
        num_steps=NUM_STEPS,
    )


def _shape(flux: Any) -> ModelShape:
    params = flux.params
    is_approximated = hasattr(flux, "distilled_guidance_layer")
    is_global = bool(getattr(params, "global_modulation", False))
    side = int(flux.patch_size)
    vector = getattr(params, "vec_in_dim", None)
    guidance = (EMBEDDING_WIDTH,) if getattr(params, "guidance_embed", False) else ()
    embedded = (EMBEDDING_WIDTH, *guidance, *((vector,) if vector else ()))
    return ModelShape(
        name=type(flux).__name__,
        width=flux.hidden_size,
        num_double_blocks=len(flux.double_blocks),
        num_single_blocks=len(flux.single_blocks),
        mlp_ratio=int(params.mlp_ratio),
        is_gated=bool(getattr(params, "mlp_silu_act", False)),
        has_bias=not is_global,
        modulation="approximator" if is_approximated else "global" if is_global else "blocks",
        in_width=params.in_channels * side * side,
        out_width=params.out_channels * side * side,
        text_width=params.context_in_dim,
        embedded=() if is_approximated else embedded,
        num_text_tokens=0,
        num_steps=NUM_STEPS,
    )
