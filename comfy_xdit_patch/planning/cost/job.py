"""What is to be computed, on whatever machine: model, sizes, precision, and how kernels start.

Runs in: the command line's process.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfy_xdit_patch.planning.cost.model_shape import ModelShape, Precision
from comfy_xdit_patch.planning.plan import Workload


@dataclass(frozen=True, slots=True)
class Execution:
    """How kernels reach the GPU.

    ``elementwise_values`` is what unfused kernels read and write for each token and block, in
    units of its features. Calls are ATen operators from Python; those that shared modulation adds
    come once a forward.
    """

    name: str
    elementwise_values: float
    calls_per_block: float
    calls_per_attention: float
    calls_per_shared_modulation: float
    """Beside those, where tokens or columns are shared: two collectives and their copies."""


EAGER = Execution(
    "eager",
    # Fitted to eager against compiled: SGLang on H100 46, cache-dit on L20 61, flumina on 4090 67.
    elementwise_values=60,
    # Counted in ComfyUI: 3790 for FLUX.1's 57 blocks (FLUX.2: 2749 for 56).
    calls_per_block=66.5,
    # Counted (tests/parallel/test_counted_calls.py): 19 of torch and 2 exchanges by ulysses.
    calls_per_attention=21,
    # Counted (the same test).
    calls_per_shared_modulation=13,
)
COMPILED = Execution("compiled", 0, 0, 0, 0)
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
        return self.workload.num_tokens
