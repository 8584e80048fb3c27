"""Bytes that one rank sends in one forward, for each way to share it.

Runs in: host, worker and the command line's process.

n ranks of the axis, L blocks, S tokens, D features, e bytes for each value, W bytes of weights:

    ulysses     L 4 (S D e / n) (n - 1) / n       q, k, v out, attention's output back
    ring        L 2 (S D e / n) (n - 1)           k and v go round
    both        L (S D e / n) [4 (u - 1) / u + 2 (r - 1)],   n = u r
    tensor      (2 double + single) 2 S D e (n - 1) / n      ring all-reduces
                (12 double + 3 single) D e (n - 1) / n       modulation, where blocks have their own
    pipefusion  S D e                             each boundary of stages, all patches together
    fsdp        W (n - 1) / n

The functions take ``num_values``: S D of what the ranks of the axis share, times rows.
"""

from __future__ import annotations

from comfy_xdit_patch.planning.model_shape import COMPUTE_BYTES


def ulysses_bytes(
    local_values: float, degree: int, num_blocks: float, value_bytes: int = COMPUTE_BYTES
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
