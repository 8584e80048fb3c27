"""Cut weights along one dimension, where a part of a weight is a weight of the same kind.

Runs in: host (which asks whether) and worker (which does).

Plain tensors, and quantised ones that have one stored float for each value and one scale for all of
them. Formats with a scale for each row, block or group of values, or several values in a byte, are
not cut: their blocks need not end where a head or a rank does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from comfy_xdit_patch.transport.tensors import PLAIN_CLASSES

Ranges = Sequence[tuple[int, int]]


def can_slice(weight: torch.Tensor) -> bool:
    """Whether ``sliced`` can cut a weight of this class and format."""
    if type(weight) in PLAIN_CLASSES:
        return weight.is_floating_point()
    if not hasattr(weight, "__tensor_flatten__"):
        return False
    names, _ = weight.__tensor_flatten__()
    data = [getattr(weight, name) for name in names if _is_data(weight, name)]
    return len(data) == 1 and data[0].is_floating_point() and data[0].element_size() == 1


def sliced(weight: torch.Tensor, dim: int, ranges: Ranges) -> torch.Tensor:
    """Return the parts of a weight between these indices, joined, in memory of their own."""
    if type(weight) in PLAIN_CLASSES:
        return _joined(weight.detach(), dim, ranges)
    names, context = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {}
    for name in names:
        part = getattr(weight, name)
        inner[name] = _joined(part, dim, ranges) if _is_data(weight, name) else part.clone()
    shape = list(weight.shape)
    shape[dim] = sum(end - start for start, end in ranges)
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    of_shape = _with_shape(context, tuple(weight.shape), tuple(shape))
    made: torch.Tensor = type(weight).__tensor_unflatten__(  # type: ignore[attr-defined]
        inner, of_shape, torch.Size(shape), tuple(stride)
    )
    return made


def _is_data(weight: torch.Tensor, name: str) -> bool:
    """Whether an inner tensor is the stored values; all others must be a number each."""
    part = getattr(weight, name)
    return bool(part.shape == weight.shape) or part.numel() != 1


def _joined(tensor: torch.Tensor, dim: int, ranges: Ranges) -> torch.Tensor:
    # As bytes where it is bytes: not every backend joins every kind of float8.
    data = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    parts = [data.narrow(dim, start, end - start) for start, end in ranges]
    return torch.cat(parts, dim).view(tensor.dtype)


def _with_shape(context: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Any:
    """The same context for a tensor of another shape (comfy_kitchen keeps the original one)."""
    if isinstance(context, dict):
        return {key: _with_shape(value, old, new) for key, value in context.items()}
    return new if isinstance(context, (tuple, torch.Size)) and tuple(context) == old else context
