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
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from comfy_xdit_patch.transport.tensors import (
    PLAIN_CLASSES,
    class_name,
    digest_weight,
    flatten,
)

SAMPLE_ELEMENTS = 16
COMPILED = "._orig_mod"
"""In the names of what a compiled module holds."""
BLOCKS = ("double_blocks.", "single_blocks.")
SEPARATOR = "-"
PRESCRIBES = "ComfyAttention"
"""ComfyUI's class of a module that names an attention function."""
PREFIX = "diffusion_model."
"""Keys of patches and backups begin with it, names of the module's own tensors do not."""


def unpatched(patcher: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a ModelPatcher put aside before it patched them, by key."""
    before_hooks = {key: kept[0] for key, kept in getattr(patcher, "hook_backup", {}).items()}
    return before_hooks | {key: kept.weight for key, kept in patcher.backup.items()}


def is_dynamic(patcher: Any) -> bool:
    """Whether ComfyUI brings this ModelPatcher's weights to the device on first use (0.33)."""
    asked = getattr(patcher, "is_dynamic", None)
    return asked is not None and bool(asked())


class StoredWeight(NamedTuple):
    """A weight as it was stored, and the dtype in which ComfyUI computes with it."""

    name: str
    tensor: torch.Tensor
    dtype: torch.dtype
    """The tensor's own, unless it is plain and ComfyUI casts it on its way to the device."""
    is_left_uncast: bool = False
    """Whether ComfyUI computes with it as it is, though its module names another dtype."""

    @property
    def parts(self) -> tuple[dict[str, torch.Tensor], str]:
        """The plain tensors inside, as stored, and a text of the rest (see ``flatten``).

        Raises:
            ForeignTensorError: it is of a tensor class that cannot be taken apart.
        """
        return flatten(self.tensor)

    def cast(self, part: torch.Tensor) -> torch.Tensor:
        """Give one of the parts, or some of its elements, the dtype that is computed with."""
        return part.to(self.dtype) if self.is_cast else part

    @property
    def is_cast(self) -> bool:
        """Whether it is stored in another dtype than the one that is computed with."""
        return self.dtype != self.tensor.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight as ComfyUI computes with it."""
        if self.is_cast:
            return self.tensor.numel() * self.dtype.itemsize
        return sum(part.nbytes for part in self.parts[0].values())


def stored_weights(flux: Any, patcher: Any = None) -> Iterator[StoredWeight]:
    """What ComfyUI computes with before any patch: parameters and buffers, sorted by name.

    Sorted because a dynamic host's modules register their weights in the order of the file. Its
    weights have the file's dtype, and ``<weight>_comfy_model_dtype`` names the one that it computes
    with; small ones, such as the scales of norms, it brings to the device at once and does not cast
    (``ModelPatcherDynamic.load``), so there the dtype of the weight in use counts. Other hosts have
    cast them, and what a node put there since is meant.

    Args:
        patcher: the ModelPatcher whose patches do not count; without it the weights are those in
            use.
    """
    backup = {} if patcher is None else unpatched(patcher)
    modules = dict(flux.named_modules(remove_duplicate=False)) if is_dynamic(patcher) else {}
    found = {}
    for compiled_name, used in (*flux.named_parameters(), *flux.named_buffers()):
        name = compiled_name.replace(COMPILED, "")
        tensor = backup.get(PREFIX + name, used)
        owner, _, attribute = compiled_name.rpartition(".")
        named = getattr(modules.get(owner), f"{attribute}_comfy_model_dtype", None)
        if named is None or type(tensor) not in PLAIN_CLASSES:
            named = tensor.dtype
        dtype = used.dtype if modules and PREFIX + name in backup else named
        found[name] = StoredWeight(name, tensor, dtype, is_left_uncast=dtype != named)
    yield from (found[name] for name in sorted(found))


def fingerprint(flux: Any, *, manual_cast_dtype: torch.dtype | None, patcher: Any = None) -> str:
    """Return the fingerprint of a diffusion model: of its blocks, and of what lies around them.

    Args:
        manual_cast_dtype: of its BaseModel; the dtype that operations cast weights to.
        patcher: the ModelPatcher that may have patched its weights.

    Raises:
        ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
    """
    parts = {is_block: hashlib.sha256() for is_block in (True, False)}
    parts[True].update(f"{flux.dtype} {manual_cast_dtype}\n".encode())
    classes = {
        compiled_name.replace(COMPILED, ""): type(module)
        for compiled_name, module in flux.named_modules()
        if not hasattr(module, "_orig_mod")  # a compiled module stands in for this one
    }
    prescribed = prescribed_attention(flux)
    for name, cls in sorted(classes.items()):
        text = f"{name} {class_name(cls)} {prescribed.get(name, '')}\n"
        parts[name.startswith(BLOCKS)].update(text.encode())
    for weight in stored_weights(flux, patcher):
        total = parts[weight.name.startswith(BLOCKS)]
        inner, rest = weight.parts
        total.update(f"{weight.name} {rest}\n".encode())
        for part in sorted(inner):
            flat = inner[part].reshape(-1)
            dtype = weight.dtype if weight.is_cast else flat.dtype
            total.update(f"{part} {tuple(inner[part].size())} {dtype}\n".encode())
            for sample in (flat[:SAMPLE_ELEMENTS], flat[-SAMPLE_ELEMENTS:]):
                plain = weight.cast(sample).cpu().contiguous()
                total.update(plain.view(torch.uint8).numpy().tobytes())
    return SEPARATOR.join(part.hexdigest() for part in parts.values())


def prescribed_attention(flux: Any) -> dict[str, str]:
    """Names of the attention functions that a checkpoint prescribes, by module (from 0.39).

    A card that has no such kernel leaves it out: then host and worker would compute otherwise.
    """
    return {
        name.replace(COMPILED, ""): module.function.__name__
        for name, module in flux.named_modules()
        if type(module).__name__ == PRESCRIBES and module.function is not None
    }


def agree(theirs: str, ours: str, *, only_blocks: bool) -> bool:
    """Whether two fingerprints are of the same model, or of the same blocks."""
    end = 1 if only_blocks else None
    return theirs.split(SEPARATOR)[:end] == ours.split(SEPARATOR)[:end]


def digests(flux: Any) -> dict[str, str]:
    """Digest every weight as it is used now, patched or not.

    Raises:
        ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
    """
    return {weight.name: digest_weight(weight.tensor) for weight in stored_weights(flux)}
