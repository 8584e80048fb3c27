"""How long one GPU computes on its part of a forward.

Runs in: host, worker and the command line's process. Pure arithmetic, no torch.

    linears        FLOPs / (rate x M / (M + 72)) for M rows, and never less than reading the weights
    attention      FLOPs / rate
    modulation     reading weights that serve one row each; what no sharing of tokens divides
    casts          reading weights as stored and writing them as bf16, where these differ
    element-wise   bytes that unfused kernels move, in eager mode
"""

from __future__ import annotations

from dataclasses import dataclass

from comfy_xdit_patch.planning.job import Job
from comfy_xdit_patch.planning.machine import Gpu

SMALL_MATRIX_ROWS = 72
"""A linear of M rows runs at M / (M + this) of its full rate. Fitted: 0.94 at 1152 rows (H100)."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has of a forward, as parts of 1.

    ``tokens`` are those it holds, ``queries`` those that its heads attend for: all, but for a
    ring. ``columns`` is its part of every weight matrix. ``num_patches``: in how many pieces the
    tokens come by (PipeFusion).
    """

    num_rows: int
    stage: float = 1.0
    tokens: float = 1.0
    queries: float = 1.0
    heads: float = 1.0
    columns: float = 1.0
    num_patches: int = 1


@dataclass(frozen=True, slots=True)
class ComputeTime:
    """Seconds of one rank, of all patches together."""

    linear_s: float
    attention_s: float
    modulation_s: float
    cast_s: float
    elementwise_s: float

    @property
    def total_s(self) -> float:
        return (
            self.linear_s + self.attention_s + self.modulation_s + self.cast_s + self.elementwise_s
        )


def compute_time(job: Job, gpu: Gpu, part: Part) -> ComputeTime:
    """Time one rank's part."""
    shape, precision = job.shape, job.precision
    local_tokens = part.num_rows * job.num_tokens * part.tokens
    divided = part.stage * part.columns

    is_fp8 = precision.is_fp8_compute and gpu.fp8_flops > 0
    is_cast = precision.bytes_per_weight < precision.bytes_per_value and not is_fp8
    rate = gpu.fp8_flops if is_fp8 else gpu.linear_flops
    # Cutting the matrix by columns makes it as much smaller as cutting its rows.
    matrix_rows = local_tokens * part.columns / part.num_patches
    efficiency = matrix_rows / (matrix_rows + SMALL_MATRIX_ROWS)
    flops = part.num_rows * shape.linear_flops(job.num_tokens) * part.tokens * divided

    block_weights = (shape.num_weights - shape.num_modulation_weights) * divided * part.num_patches
    read_bytes = precision.bytes_per_value if is_cast else precision.bytes_per_weight
    cast_bytes = precision.bytes_per_weight + precision.bytes_per_value if is_cast else 0
    values = job.execution.elementwise_values * shape.width * shape.num_blocks * divided
    return ComputeTime(
        linear_s=max(
            flops / (rate * efficiency), block_weights * read_bytes / gpu.memory_bytes_per_s
        ),
        attention_s=part.num_rows
        * shape.attention_flops(job.num_tokens)
        * part.queries
        * part.heads
        * part.stage
        / gpu.attention_flops,
        modulation_s=shape.num_modulation_weights
        * divided
        * precision.bytes_per_weight
        / gpu.memory_bytes_per_s,
        cast_s=block_weights * cast_bytes / gpu.memory_bytes_per_s,
        elementwise_s=local_tokens * values * precision.bytes_per_value / gpu.memory_bytes_per_s,
    )
