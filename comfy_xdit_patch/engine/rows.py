"""Take this rank's rows of the batch.

Runs in: worker process.
"""

from __future__ import annotations

from typing import Any

import torch


def rows_of(value: Any, first: int, end: int) -> Any:
    """Take rows of the batch from every tensor of an argument."""
    if isinstance(value, torch.Tensor):
        return value[first:end]
    if isinstance(value, list):
        return [rows_of(item, first, end) for item in value]
    if isinstance(value, dict):
        return {key: rows_of(item, first, end) for key, item in value.items()}
    return value
