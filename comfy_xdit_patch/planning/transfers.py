"""In which form heads travel among the ranks of Ulysses: ``XDIT_TRANSFER_DTYPE``.

Runs in: host and worker (and the command line). Pure arithmetic, no torch.
"""

from __future__ import annotations

from math import gcd
from typing import Literal, get_args

TransferDtype = Literal["exact", "fp8", "int8"]
"""``exact`` is the model's own dtype; the others are approximate."""
TRANSFER_DTYPES: tuple[TransferDtype, ...] = get_args(TransferDtype)

VALUES_PER_SCALE = 32
"""Neighbours in a head that share a scale, as in GGUF's Q8_0. FLUX's heads have a few channels that
are far larger than the rest: with one scale for all 128 these cost the others their bits
(docs/parity.md), and one for each 16 would be another 6 % of the bytes."""


def values_per_scale(head_width: int) -> int:
    """How many values of one token and head share a scale."""
    return gcd(head_width, VALUES_PER_SCALE)


def transfer_bytes(
    num_values: int, dtype: TransferDtype, *, head_width: int, value_bytes: int
) -> int:
    """Bytes in which values of whole heads travel, with their scales.

    Args:
        value_bytes: of one value, and of one scale, in the model's dtype.
    """
    if dtype == "exact":
        return num_values * value_bytes
    together = values_per_scale(head_width)
    return num_values // together * (together + value_bytes)
