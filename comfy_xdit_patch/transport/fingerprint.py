"""A short name for a model's weights and operations, computed alike in host and worker.

Runs in: host and worker.

A worker reads the same file with the same loader, so its model should be the host's. This checks
that it is: names, shapes, dtypes and classes of everything, and the first and last bytes of every
tensor. It sees another dtype choice, other operations, a changed file, and any edit of whole
tensors in the host; reading 24 GB to see more would cost a second of every run.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

SAMPLE_ELEMENTS = 16
_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


class ForeignTensorError(TypeError):
    """A weight is of a tensor class whose contents cannot be compared plainly."""


def fingerprint(flux: Any, *, manual_cast_dtype: torch.dtype | None) -> str:
    """Return the fingerprint of a diffusion model.

    Args:
        manual_cast_dtype: of its BaseModel; the dtype that operations cast weights to.

    Raises:
        ForeignTensorError: a weight is a tensor subclass (quantised weights).
    """
    digest = hashlib.sha256()
    digest.update(f"{flux.dtype} {manual_cast_dtype}\n".encode())
    for name, module in flux.named_modules():
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__}\n".encode())
    for name, tensor in (*flux.named_parameters(), *flux.named_buffers()):
        if type(tensor) not in _PLAIN_CLASSES:
            raise ForeignTensorError(type(tensor).__name__)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        for sample in (flat[:SAMPLE_ELEMENTS], flat[-SAMPLE_ELEMENTS:]):
            digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
