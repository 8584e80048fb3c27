"""What is to be computed, on whatever machine: model, sizes, precision, and how kernels start.

Runs in: host, worker and the command line's process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfy_xdit_patch.planning.cost.model_shape import (
    EMBEDDING_WIDTH,
    ModelShape,
    Precision,
    num_tokens,
)
from comfy_xdit_patch.planning.plan import Workload

if TYPE_CHECKING:
    import torch


NUM_STEPS = 20
"""No plan that ``auto`` may take depends on it."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How kernels reach the GPU.

    ``elementwise_values`` is what unfused kernels read and write for each token and block, in
    units of its features. Calls are ATen operators from Python.
    """

    name: str
    elementwise_values: float
    calls_per_block: float
    calls_per_attention: float
    """Beside those, where tokens or columns are shared: two collectives and their copies."""


EAGER = Execution(
    "eager",
    # Fitted to eager against compiled: SGLang on H100 46, cache-dit on L20 61, flumina on 4090 67.
    elementwise_values=60,
    # Counted in ComfyUI: 3790 for FLUX.1's 57 blocks (FLUX.2: 2749 for 56).
    calls_per_block=66.5,
    calls_per_attention=10,
)
COMPILED = Execution("compiled", 0, 0, 0)
EXECUTIONS = {execution.name: execution for execution in (EAGER, COMPILED)}


@dataclass(frozen=True, slots=True)
class Job:
    """One model call, and how many of them a run has."""

    shape: ModelShape
    workload: Workload
    precision: Precision
    num_steps: int
    execution: Execution = EAGER

    @property
    def num_tokens(self) -> int:
        return num_tokens(self.workload)


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
