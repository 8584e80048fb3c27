"""Tensors that say ``cuda:N`` and are computed by the CPU.

Runs in: every process of a rig server with emulated cards.

A tensor of a card counts against the card's memory and may not meet a tensor of the CPU or of
another card. Every ATen call with one comes here (``emulated_modes.py``). Facts that shaped it:

- C++ has to see a meta tensor that claims CUDA's keys, or indexing sets a guard for a real device;
- what an in-place call returns is the very argument that it wrote to.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import emulated_allocator as allocator
import emulated_graphs as graphs
import emulated_kernels as kernels
import emulated_streams as streams
import torch
import torch.overrides
import torch.utils
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

aten = torch.ops.aten
CPU = torch.device("cpu")
MAY_MIX = {
    aten._has_compatible_shallow_copy_type.default,
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.to.dtype,
}
ANSWERS_ON_CPU = (aten._local_scalar_dense.default, aten.equal.default)
FOLLOWS_FIRST = (aten.copy_.default, aten.index.Tensor)

_counted: set[int] = set()
_written: dict[Any, list[Any]] = {}


class _PlainClass(type(torch.Tensor)):  # type: ignore[misc]
    """Makes ``Emulated`` equal to ``torch.Tensor``, for code that asks for the type of a tensor."""

    def __eq__(cls, other: object) -> bool:
        return (cls is Emulated and other is torch.Tensor) or type.__eq__(cls, other)

    def __hash__(cls) -> int:
        return type.__hash__(cls)


class Emulated(torch.Tensor, metaclass=_PlainClass):
    """A tensor on a card; ``inner`` is the CPU tensor with its contents."""

    # Of no interest to who lists what a class of tensors keeps.
    _inner: torch.Tensor
    _where: torch.device

    @staticmethod
    def __new__(
        cls: Any, inner: torch.Tensor, device: torch.device, *, counted: bool = True
    ) -> Emulated:
        shell = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device="meta")
        made: Any = torch.Tensor._make_subclass(
            cls, shell, inner.requires_grad, dispatch_device=True, device_for_backend_keys=device
        )
        made._inner, made._where = inner, device
        if counted:
            _count(inner, device.index)
        return made

    @property
    def inner(self) -> torch.Tensor:
        return self._inner

    @property
    def where(self) -> torch.device:
        return self._where

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Emulated({self.inner!r}, {self.where})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    def as_subclass(self, cls: Any) -> Any:
        """The same tensor of another class, which must be one of this machine's card as well."""
        if cls is torch.Tensor:
            return self if type(self) is Emulated else Emulated(self.inner, self.where)
        return _both(cls)(self.inner, self.where)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


@functools.cache
def _both(base: Any) -> Any:
    """A node pack's class of tensors, on a card.

    As with every class of tensors, what comes of its methods is of the class again, which on the
    CPU is the pack's own.
    """

    def torch_function(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func in torch.overrides.get_default_nowrap_functions():
            return out
        return torch._tensor._convert(out, base)  # type: ignore[attr-defined]

    made = {"__new__": Emulated.__new__, "__init__": torch.Tensor.__init__}
    made["__torch_function__"] = classmethod(torch_function)
    made |= {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base)(base.__name__, (base, Emulated), made)


def _count(inner: torch.Tensor, index: int) -> None:
    """Count a storage once, until it is gone."""
    storage = inner.untyped_storage()
    key, size = storage._cdata, storage.nbytes()
    if key in _counted:
        return
    allocator.take(index, size)
    _counted.add(key)

    def gone() -> None:
        _counted.discard(key)
        allocator.give_back(index, size)

    weakref.finalize(storage, gone)


def real(value: Any) -> Any:
    """Give what the CPU computes with in the place of a card's tensor or device."""
    if isinstance(value, Emulated):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an ATen call on the CPU; its result lies where CUDA would put it."""
    if func is torch.ops.prim.device.default:
        return args[0].where
    flat, _ = tree_flatten((args, kwargs))
    _check_places(func, flat)
    streams.check(func, args, kwargs)
    device = _device_of(func, args, kwargs, flat)
    real_args, real_kwargs = tree_map(real, args), dict(tree_map(real, kwargs))
    if real_kwargs.get("pin_memory"):
        real_kwargs["pin_memory"] = False
    run = kernels.KERNELS.get(func, func)
    if graphs.capturing() is None or streams.is_view(func):
        out = run(*real_args, **real_kwargs)
    else:
        _check_capture(func, flat, device)
        written = [real(value) for value in streams.written(func, args, kwargs)]
        out = graphs.launch(run, real_args, real_kwargs, written)
    if device.type != "cuda" or func in ANSWERS_ON_CPU:
        return out
    out = tree_map_only(
        torch.Tensor, lambda t: t if isinstance(t, Emulated) else Emulated(t, device), out
    )
    return _written_arguments(func, args, kwargs, out)


def _check_places(func: Any, flat: list[Any]) -> None:
    places = {str(t.where) for t in flat if isinstance(t, Emulated)}
    if not places or func in MAY_MIX:
        return
    for t in flat:
        if isinstance(t, torch.Tensor) and not isinstance(t, Emulated) and t.dim():
            places.add(str(t.device))
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {sorted(places)} in {func}"
        )


def _check_capture(func: Any, flat: list[Any], device: torch.device) -> None:
    """See that a call in a graph has nothing to do with the host's memory."""
    if func in ANSWERS_ON_CPU or func.namespace == "c10d":
        graphs.forbid(f"{func} gives the host something")
    is_of_host = [isinstance(t, torch.Tensor) and not isinstance(t, Emulated) for t in flat]
    if func in MAY_MIX and (any(is_of_host) or device.type != "cuda"):
        graphs.forbid("Cannot copy between CPU and CUDA tensors during CUDA graph capture")


def _device_of(func: Any, args: Any, kwargs: dict[str, Any], flat: list[Any]) -> torch.device:
    want = kwargs.get("device") or next((t for t in flat if isinstance(t, torch.device)), None)
    if func is aten.to.other:
        want = args[1].device
    if func in FOLLOWS_FIRST:
        want = args[0].device
    if want is None:
        return next((t.where for t in flat if isinstance(t, Emulated)), CPU)
    device = torch.device(want)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _written_arguments(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    if func not in _written:
        _written[func] = [_written_by(func._schema, result) for result in func._schema.returns]
    places = _written[func]
    if not any(places):
        return out
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    for n, place in enumerate(places[: len(outs)]):
        if place is not None:
            outs[n] = args[place[0]] if place[0] < len(args) else kwargs[place[1]]
    return type(out)(outs) if isinstance(out, (tuple, list)) else outs[0]


def _written_by(schema: Any, result: Any) -> tuple[int, str] | None:
    """Place and name of the argument that a result of a call is."""
    if result.alias_info is None or not result.alias_info.is_write:
        return None
    for place, argument in enumerate(schema.arguments):
        alias = argument.alias_info
        if alias is not None and alias.is_write and alias.before_set & result.alias_info.before_set:
            return place, argument.name
    return None
