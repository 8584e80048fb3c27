"""A short name for a model's stored weights and operations, computed alike in host and worker.

Runs in: host and worker.

A worker reads the same file with the same loader, so its model should be the host's. This checks
that it is: names, shapes, dtypes and classes of everything, and contents. A ``Look`` says how much
of those: values at ``NUM_SAMPLES`` places of each tensor, others in each look, and of some tensors
a digest of every byte. What that sees, and with which odds, is in docs/mechanisms.md.

Stored weights are those before any LoRA: where ComfyUI has patched one, its backup counts.
A hook's patches lie over a LoRA's, so where both have patched a weight, the LoRA's backup counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from comfy_xdit_patch.wire.tensors import (
    PLAIN_CLASSES,
    Form,
    class_name,
    digest,
    digest_weight,
    take_apart,
)

COMPILED = "._orig_mod"
"""In the names of what a compiled module holds."""
BLOCKS = ("double_blocks.", "single_blocks.")
SEPARATOR = "-"
PRESCRIBES = "ComfyAttention"
"""ComfyUI's class of a module that names an attention function."""
PREFIX = "diffusion_model."
"""Keys of patches and backups begin with it, names of the module's own tensors do not."""


NUM_SAMPLES = 2048
"""Places in each tensor."""


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
    def parts(self) -> tuple[dict[str, torch.Tensor], Form]:
        """The plain tensors inside, as stored, and the form that they are in.

        Raises:
            ForeignTensorError: it is of a tensor class that cannot be taken apart.
        """
        return take_apart(self.tensor)

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


def stored_weights(
    flux: Any, patcher: Any = None, *, prefix: str = PREFIX
) -> Iterator[StoredWeight]:
    """What ComfyUI computes with before any patch: parameters and buffers, sorted by name.

    Sorted because a dynamic host's modules register their weights in the order of the file. Its
    weights have the file's dtype, and ``<weight>_comfy_model_dtype`` names the one that it computes
    with; small ones, such as the scales of norms, it brings to the device at once and does not cast
    (``ModelPatcherDynamic.load``), so there the dtype of the weight in use counts. Other hosts have
    cast them, and what a node put there since is meant.

    Args:
        patcher: the ModelPatcher whose patches do not count; without it the weights are those in
            use.
        prefix: of the module's tensors among the ModelPatcher's keys.
    """
    backup = {} if patcher is None else unpatched(patcher)
    modules = dict(flux.named_modules(remove_duplicate=False)) if is_dynamic(patcher) else {}
    found = {}
    for compiled_name, used in (*flux.named_parameters(), *flux.named_buffers()):
        name = compiled_name.replace(COMPILED, "")
        tensor = backup.get(prefix + name, used)
        owner, _, attribute = compiled_name.rpartition(".")
        named = getattr(modules.get(owner), f"{attribute}_comfy_model_dtype", None)
        if named is None or type(tensor) not in PLAIN_CLASSES:
            named = tensor.dtype
        dtype = used.dtype if modules and prefix + name in backup else named
        found[name] = StoredWeight(name, tensor, dtype, is_left_uncast=dtype != named)
    yield from (found[name] for name in sorted(found))


class Look(NamedTuple):
    """How closely contents are looked at.

    ``seed`` chooses the places. With ``parts`` the first tensor of so many, the ``part``, is read
    whole, and so is each that many further on; 0 reads none whole.
    """

    seed: int
    parts: int = 0
    part: int = 0

    def is_whole(self, number: int) -> bool:
        """Whether every byte of the weight with this number in the order of names counts."""
        return self.parts > 0 and number % self.parts == self.part


class Fingerprint:
    """What a diffusion model is, to be named by its contents as often as they are looked at.

    Args:
        manual_cast_dtype: of its BaseModel; the dtype that operations cast weights to.
        patcher: the ModelPatcher that may have patched its weights.
        prefix: as in ``stored_weights``.

    Raises:
        ForeignTensorError: a weight is of a tensor class that cannot be taken apart.
    """

    def __init__(
        self,
        flux: Any,
        *,
        manual_cast_dtype: torch.dtype | None,
        patcher: Any = None,
        prefix: str = PREFIX,
    ) -> None:
        structure = _Halves()
        structure.update(
            BLOCKS[0], f"{getattr(flux, 'dtype', None)} {manual_cast_dtype}\n".encode()
        )
        classes = {
            compiled_name.replace(COMPILED, ""): type(module)
            for compiled_name, module in flux.named_modules()
            if not hasattr(module, "_orig_mod")  # a compiled module stands in for this one
        }
        prescribed = prescribed_attention(flux)
        for name, cls in sorted(classes.items()):
            text = f"{name} {class_name(cls)} {prescribed.get(name, '')}\n"
            structure.update(name, text.encode())
        self._parts: list[tuple[StoredWeight, torch.Tensor]] = []
        for weight in stored_weights(flux, patcher, prefix=prefix):
            inner, form = weight.parts
            structure.update(weight.name, f"{weight.name} {form.text}\n".encode())
            for part in sorted(inner):
                dtype = weight.dtype if weight.is_cast else inner[part].dtype
                shape = tuple(inner[part].size())
                structure.update(weight.name, f"{part} {shape} {dtype}\n".encode())
                self._parts.append((weight, inner[part]))
        self._structure = structure
        self._digests: dict[int, str] = {}

    @property
    def bytes_of_cpu(self) -> int:
        """Bytes in CPU memory, where it takes long to read them."""
        return sum(part.nbytes for _, part in self._parts if part.device.type == "cpu")

    @property
    def versions(self) -> list[int]:
        """How often each tensor was written to, where torch counts writes."""
        return [0 if part.is_inference() else part._version for _, part in self._parts]

    def of(self, look: Look) -> str:
        """Return the fingerprint. What is read whole is read once; contents may not change."""
        total = self._structure.copy()
        places = Places(look.seed)
        for number, (weight, part) in enumerate(self._parts):
            if look.is_whole(number):
                if number not in self._digests:
                    self._digests[number] = digest(weight.cast(part))
                total.update(weight.name, self._digests[number].encode())
                continue
            flat = part.reshape(-1)
            size = flat.numel()
            values = flat if size <= NUM_SAMPLES else flat[places.of(size).to(flat.device)]
            plain = weight.cast(values).cpu().contiguous()
            total.update(weight.name, plain.view(torch.uint8).numpy().tobytes())
        return total.text


class _Halves:
    """One hash of the blocks, and one of what lies around them."""

    def __init__(self) -> None:
        self._hashes = [hashlib.sha256(), hashlib.sha256()]

    def update(self, name: str, data: bytes) -> None:
        """Add what belongs to a module or weight of this name."""
        self._hashes[not name.startswith(BLOCKS)].update(data)

    def copy(self) -> _Halves:
        made = _Halves()
        made._hashes = [one.copy() for one in self._hashes]
        return made

    @property
    def text(self) -> str:
        return SEPARATOR.join(one.hexdigest() for one in self._hashes)


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


class Places:
    """Places to look at: a tensor is cut into pieces of one length, and one of each is chosen."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shifts = torch.rand(NUM_SAMPLES, generator=generator, dtype=torch.float64)
        self._pieces = torch.arange(NUM_SAMPLES, dtype=torch.float64) + shifts
        self._known: dict[int, torch.Tensor] = {}

    def of(self, size: int) -> torch.Tensor:
        """Return the places in a tensor of so many elements, at least ``NUM_SAMPLES``."""
        if size not in self._known:
            places = (self._pieces * (size / NUM_SAMPLES)).long()
            self._known[size] = places.clamp_(max=size - 1)
        return self._known[size]
