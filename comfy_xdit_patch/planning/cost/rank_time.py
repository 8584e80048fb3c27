"""How long one GPU computes on its part of a forward.

Runs in: the command line's process. Pure arithmetic, no torch.

    linears        FLOPs / (rate x M / (M + 72)) for M rows, and never less than reading the weights
    attention      FLOPs / rate
    modulation     reading weights that serve one row each; what no sharing of tokens divides
                   (but sharing them does)
    casts          reading weights as stored and writing them as bf16, where these differ
    element-wise   bytes that unfused kernels move, in eager mode

Bytes that one rank sends, for n ranks of the axis, L blocks, S tokens, D features, e bytes for each
value, W bytes of weights:

    ulysses     L 4 (S D e / n) (n - 1) / n       q, k, v out, attention's output back
    ring        L 2 (S D e / n) (n - 1)           k and v go round
    both        L (S D e / n) [4 (u - 1) / u + 2 (r - 1)],   n = u r
    tensor      (2 double + single) 2 S D e (n - 1) / n      ring all-reduces
                (12 double + 3 single) D e (n - 1) / n       modulation, where blocks have their own
    pipefusion  S D e                             each boundary of stages, all patches together
    fsdp        W (n - 1) / n
    modulation  (12 double + 3 single) D e (n - 1) / n       where only that is shared

The functions take ``num_values``: S D of what the ranks of the axis share, times rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfy_xdit_patch.planning.cost.machine import Gpu
from comfy_xdit_patch.planning.cost.model_shape import COMPUTE_BYTES, Job

SMALL_MATRIX_ROWS = 72
"""A linear of M rows runs at M / (M + this) of its full rate. Fitted: 0.94 at 1152 rows (H100)."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has of a forward, as parts of 1.

    ``tokens`` are those it holds, ``queries`` those that its heads attend for: all, but for a
    ring. ``columns`` is its part of every weight matrix. ``modulation`` is how much of the weights
    that modulate blocks it reads: once all, or its own for each part of the batch. ``num_patches``:
    in how many pieces the tokens come by (PipeFusion).
    """

    num_rows: int
    stage: float = 1.0
    tokens: float = 1.0
    queries: float = 1.0
    heads: float = 1.0
    columns: float = 1.0
    modulation: float = 1.0
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
    modulation_weights = shape.num_modulation_weights * divided * part.modulation
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
        modulation_s=modulation_weights * read_bytes / gpu.memory_bytes_per_s,
        cast_s=(block_weights + modulation_weights) * cast_bytes / gpu.memory_bytes_per_s,
        elementwise_s=local_tokens * values * precision.bytes_per_value / gpu.memory_bytes_per_s,
    )


def ulysses_bytes(
    local_values: float, degree: int, num_blocks: float, value_bytes: float = COMPUTE_BYTES
) -> float:
    """Send q, k, v before attention and its output after; ``local_values`` of one rank."""
    return num_blocks * 4 * local_values * value_bytes * (degree - 1) / degree


def ring_bytes(
    local_values: float, degree: int, num_blocks: float, value_bytes: int = COMPUTE_BYTES
) -> float:
    """Pass k and v on, until each rank has seen all of them."""
    return num_blocks * 2 * local_values * value_bytes * (degree - 1)


def tensor_bytes(
    num_values: float, degree: int, num_gathers: float, value_bytes: int = COMPUTE_BYTES
) -> float:
    """Add the parts of every split product: all-reduce as reduce-scatter and all-gather."""
    return num_gathers * 2 * num_values * value_bytes * (degree - 1) / degree


def modulation_bytes(num_values: float, degree: int, value_bytes: int = COMPUTE_BYTES) -> float:
    """Gather what linears of modulation gave, one row for each image; of all blocks together."""
    return num_values * value_bytes * (degree - 1) / degree


def pipefusion_bytes(num_values: float, value_bytes: int = COMPUTE_BYTES) -> float:
    """Hand the tokens to the next stage."""
    return num_values * value_bytes


def fsdp_bytes(weight_bytes: float, degree: int) -> float:
    """Gather all weights once."""
    return weight_bytes * (degree - 1) / degree
