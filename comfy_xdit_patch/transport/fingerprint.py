"""A short name for a model's stored weights and operations, computed alike in host and worker.

Runs in: host and worker.

A worker reads the same file with the same loader, so its model should be the host's. This checks
that it is: names, shapes, dtypes and classes of everything, and the first and last bytes of every
tensor. It sees another dtype choice, other operations, a changed file, and any edit of whole
tensors in the host; reading 24 GB to see more would cost a second of every run.

Stored weights are those before any LoRA: where ComfyUI has patched one, its backup counts.
A hook's patches lie over a LoRA's, so where both have patched a weight, the LoRA's backup counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from comfy_xdit_patch.transport.tensors import digest_weight, flatten

SAMPLE_ELEMENTS = 16
COMPILED = "._orig_mod"
"""In the names of what a compiled module holds."""
PREFIX = "diffusion_model."
"""Keys of patches and backups begin with it, names of the module's own tensors do not."""


def unpatched(patcher: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a ModelPatcher put aside before it patched them, by key."""
    before_hooks = {key: kept[0] for key, kept in getattr(patcher, "hook_backup", {}).items()}
    return before_hooks | {key: kept.weight for key, kept in patcher.backup.items()}


def stored_weights(
    flux: Any, backup: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, as they were before ComfyUI patched them.

    Args:
        backup: from ``unpatched``; without it the weights are those in use.
    """
    for compiled_name, tensor in (*flux.named_parameters(), *flux.named_buffers()):
        name = compiled_name.replace(COMPILED, "")
        yield name, tensor if backup is None else backup.get(PREFIX + name, tensor)


def fingerprint(
    flux: Any,
    *,
    manual_cast_dtype: torch.dtype | None,
    backup: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Return the fingerprint of a diffusion model.

    Args:
        manual_cast_dtype: of its BaseModel; the dtype that operations cast weights to.
        backup: from ``unpatched``, if weights are patched.

    Raises:
        ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
    """
    total = hashlib.sha256()
    total.update(f"{flux.dtype} {manual_cast_dtype}\n".encode())
    for compiled_name, module in flux.named_modules():
        name = compiled_name.replace(COMPILED, "")
        if hasattr(module, "_orig_mod"):
            continue  # a compiled module stands in for this one
        total.update(f"{name} {type(module).__module__}.{type(module).__qualname__}\n".encode())
    for name, weight in stored_weights(flux, backup):
        inner, rest = flatten(weight)
        total.update(f"{name} {rest}\n".encode())
        for part in sorted(inner):
            tensor = inner[part]
            total.update(f"{part} {tuple(tensor.size())} {tensor.dtype}\n".encode())
            flat = tensor.reshape(-1)
            for sample in (flat[:SAMPLE_ELEMENTS], flat[-SAMPLE_ELEMENTS:]):
                total.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digests(flux: Any) -> dict[str, str]:
    """Digest every weight as it is used now, patched or not.

    Raises:
        ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
    """
    return {name: digest_weight(weight) for name, weight in stored_weights(flux)}
