"""Take weights of every tensor class apart, cut and digest what is inside, put them together.

Runs in: host and worker.

Quantised weights are tensor subclasses, of two kinds: wrappers around plain tensors, which speak
PyTorch's ``__tensor_flatten__`` protocol (ComfyUI's and comfy_kitchen's QuantizedTensor), and plain
storage under a class with attributes of its own (ComfyUI-GGUF's GGMLTensor). Neither can be
compared, copied or pickled as it is; what is inside can.

Parts of a weight are made of plain tensors, and of quantised ones that have one stored float for
each value and one scale for all of them. Formats with a scale for each row, block or group of
values, or several values in a byte, are not cut: their blocks need not end where a head or a rank
does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)
DIGEST_PIECE = 1 << 16
"""Words at a time, for each thread: few enough for a core's own cache."""
DEVICE_PIECE = 1 << 22
_MASK = (1 << 64) - 1
# What GGUF's patcher hangs on a weight for the LoRA of the moment: no part of the stored weight.
_PASSING_ATTRIBUTES = ("patches",)


class ForeignTensorError(TypeError):
    """A weight is of a tensor class that cannot be taken apart."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a weight is beside the plain tensors inside of it.

    ``values`` are the context of a wrapper, or the attributes of plain storage. A wrapper whose
    ``size`` and ``stride`` are not known here finds them out from its tensors.
    """

    cls: type[Any]
    is_wrapper: bool
    values: Any
    size: torch.Size | None = None
    stride: tuple[int, ...] | None = None

    def join(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Put a weight of this form together."""
        made: torch.Tensor
        if self.is_wrapper:
            made = self.cls.__tensor_unflatten__(parts, self.values, self.size, self.stride)
        elif self.cls in PLAIN_CLASSES:
            made = parts[""]
        else:
            made = parts[""].as_subclass(self.cls)
            vars(made).update(self.values)
        return made

    def resized(self, dim: int, length: int) -> Form:
        """The form of a weight that is as long as this in one dimension."""
        if not self.is_wrapper or self.size is None:
            return self
        size = torch.Size([*self.size[:dim], length, *self.size[dim + 1 :]])
        stride = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
        return Form(
            self.cls, True, _with_shape(self.values, tuple(self.size), tuple(size)), size, stride
        )

    @property
    def stored_values(self) -> Any:
        """``values`` without what hangs on a weight for a while."""
        if self.is_wrapper:
            return self.values
        return {
            name: value
            for name, value in sorted(self.values.items())
            if name not in _PASSING_ATTRIBUTES and not name.startswith("_")
        }

    @property
    def text(self) -> str:
        """Everything that the weight's value depends on beside its tensors, alike everywhere.

        Raises:
            ForeignTensorError: its class keeps more than tensors and plain values.
        """
        if self.cls in PLAIN_CLASSES:
            return ""
        return f"{class_name(self.cls)} {_text(self.stored_values, self.cls)}"


def take_apart(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], Form]:
    """Return the plain tensors inside of a weight by name, views of its memory, and its form.

    A plain tensor, and plain storage, with the sizes that it really has, have the name "".

    Raises:
        ForeignTensorError: inside of its class are tensors that are not plain.
    """
    cls = type(weight)
    if cls in PLAIN_CLASSES:
        return {"": weight.detach()}, Form(cls, False, {})
    if hasattr(weight, "__tensor_flatten__"):
        names, context = weight.__tensor_flatten__()
        parts = {name: getattr(weight, name) for name in names}
        if any(type(part) not in PLAIN_CLASSES for part in parts.values()):
            raise ForeignTensorError(cls.__name__)
        return parts, Form(cls, True, context, weight.size(), weight.stride())
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        plain = torch.Tensor.detach(weight).as_subclass(torch.Tensor)
    return {"": plain}, Form(cls, False, dict(vars(weight)))


def as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    """Have a tensor of any class be what a module takes for a parameter."""
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    if type(tensor) is torch.Tensor:
        return torch.nn.Parameter(tensor, requires_grad=False)
    # As ``torch.nn.Parameter`` marks subclasses; it would call ``detach``, which loses attributes.
    tensor._is_param = True
    return tensor


def dtype_name(dtype: torch.dtype) -> str:
    """``float16``, as messages have it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name."""
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype), name
    return dtype


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it; a GPU is waited for."""
    # A sum is quicker, and says the same unless half precision overflows in it.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def class_name(cls: type[Any]) -> str:
    """``module.QualifiedName`` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _text(value: Any, owner: type[Any]) -> str:
    """Spell a value alike in every process.

    Raises:
        ForeignTensorError: the value is of a type whose text says too little.
    """
    if isinstance(value, type):
        return class_name(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_text(value[k], owner)}" for k in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ",".join(_text(item, owner) for item in value) + ")"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return str(value)
    raise ForeignTensorError(owner.__name__)


def digest(tensor: torch.Tensor) -> str:
    """Name a plain tensor's contents, computed where it lives.

    The sum of its 64-bit words, each mixed with its place, modulo 2**64: made to notice accidents
    of transport and arithmetic and edits in place, not an adversary. Equal contents have equal
    digests on every device.

    Mixed, because edits have a structure that plain or weighted sums cancel: the signs of a column
    of 1024 floats that change are 1024 times 2**63, or 2**31.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    num_words = flat.numel() // 8
    words = _aligned(flat[: num_words * 8]).view(torch.int64)
    is_cpu = flat.device.type == "cpu"
    size = DIGEST_PIECE * torch.get_num_threads() if is_cpu else DEVICE_PIECE
    places = torch.arange(min(num_words, size), dtype=torch.int64, device=flat.device) * _ODD[0]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, num_words, size):
        piece = words[start : start + size]
        mixed = places[: piece.numel()] + _signed(start * _ODD[0])
        mixed ^= piece
        for factor, shift in ((_ODD[1], 32), (_ODD[2], 29)):
            mixed *= factor
            mixed ^= mixed >> shift
        total += mixed.sum()
    tail = bytes(flat[num_words * 8 :].cpu().tolist()).hex()
    dtype = dtype_name(tensor.dtype)
    shape = "x".join(str(size) for size in tensor.size())
    return f"{dtype}[{shape}]:{int(total) & _MASK:016x}{tail}"


def _signed(word: int) -> int:
    """The same 64 bits as torch has them."""
    return ((word + (1 << 63)) & _MASK) - (1 << 63)


_ODD = tuple(map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))
"""Factors of SplitMix64, whose bits are as good as random."""


def _aligned(flat: torch.Tensor) -> torch.Tensor:
    """A view of another word size needs an offset that divides; a copy has it."""
    return flat if flat.storage_offset() % 8 == 0 and flat.data_ptr() % 8 == 0 else flat.clone()


def digest_weight(tensor: torch.Tensor) -> str:
    """Digest a weight of any class.

    Raises:
        ForeignTensorError: its class keeps more than tensors and plain values.
    """
    parts, form = take_apart(tensor)
    named = (f"{name}={digest(parts[name])}" for name in sorted(parts))
    return " ".join([form.text, *named]).strip()


Ranges = Sequence[tuple[int, int]]


def can_cut(weight: torch.Tensor) -> bool:
    """Whether ``cut_to`` can cut a weight of this class and format."""
    try:
        parts, form = take_apart(weight)
    except ForeignTensorError:
        return False
    if not form.is_wrapper:
        return form.cls in PLAIN_CLASSES and weight.is_floating_point()
    data = [part for part in parts.values() if _is_data(part, weight)]
    return len(data) == 1 and data[0].is_floating_point() and data[0].element_size() == 1


def cut_to(weight: torch.Tensor, dim: int, ranges: Ranges) -> torch.Tensor:
    """Return the parts of a weight between these indices, joined, in memory of their own."""
    parts, form = take_apart(weight)
    cut = {
        name: _joined(part, dim, ranges) if _is_data(part, weight) else part.clone()
        for name, part in parts.items()
    }
    return form.resized(dim, sum(end - start for start, end in ranges)).join(cut)


def _is_data(part: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether an inner tensor is the stored values; all others must be a number each."""
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
