"""A ControlNet's residual that exists on the workers only.

Runs in: host process.

To ComfyUI it is a tensor: it has shape, dtype and device, and ComfyUI multiplies it by a strength
and adds another ControlNet's to it. What is done to it is written down as a recipe, which the
workers follow on their own tokens. Anything else that anybody does with it needs the numbers: then
ComfyUI's own ControlNet computes them here, once, and the object is an ordinary tensor from there
on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.messages.requests import Tree

aten = torch.ops.aten
TIMES = (aten.mul.Tensor, aten.mul.Scalar)
TIMES_IN_PLACE = (aten.mul_.Tensor, aten.mul_.Scalar)
Recipe = tuple[Any, ...]
Residuals = Mapping[str, Sequence[torch.Tensor | None]]
"""What a ControlNet returns: for each of ComfyUI's lists a residual or None for every block."""


class ControlCall:
    """One call of a ControlNet on the workers.

    ``compute`` runs ComfyUI's own forward of the ControlNet here. The workers are told when nothing
    refers to the call any more.
    """

    def __init__(
        self,
        number: int,
        *,
        plan: ParallelPlan,
        layout: Mapping[str, Sequence[int | None]],
        compute: Callable[[], Residuals],
        gone: list[int],
    ) -> None:
        self.number = number
        self.plan = plan
        self._layout = layout
        self._compute = compute
        self._here: dict[int, torch.Tensor] = {}
        weakref.finalize(self, gone.append, number).atexit = False

    def residual(self, index: int) -> torch.Tensor:
        """Return the numbers of one residual, computed here."""
        if not self._here:
            for name, tensors in self._compute().items():
                for place, tensor in zip(self._layout[name], tensors, strict=True):
                    if place is not None and tensor is not None:
                        self._here[place] = tensor
        return self._here[index]


def calls_kept(_: Crew) -> weakref.WeakSet[ControlCall]:
    """Those whose residuals the ranks keep."""
    return weakref.WeakSet()


class DeferredResidual(torch.Tensor):
    """A residual by its recipe: see the module, and ``worker/shard/residuals.py`` for the steps."""

    recipe: Recipe
    here: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def make(
        recipe: Recipe, *, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> DeferredResidual:
        """Return the residual of a recipe."""
        made: DeferredResidual = torch.Tensor._make_wrapper_subclass(
            DeferredResidual, tuple(shape), dtype=dtype, device=device
        )
        made.recipe, made.here = recipe, None
        return made

    def numbers(self) -> torch.Tensor:
        """Become an ordinary tensor, and return it."""
        if self.here is None:
            self.here = _follow(self.recipe)
        return self.here

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        deferred = _recorded(func, args, kwargs)
        if deferred is not None:
            return deferred
        owners: dict[int, DeferredResidual] = {}

        def unwrap(value: Any) -> Any:
            if isinstance(value, DeferredResidual):
                owners[id(value.numbers())] = value
                return value.numbers()
            return value

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        # What was changed in place is still the same object to who holds it.
        return tree_map(lambda value: owners.get(id(value), value), out)


def _recorded(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> DeferredResidual | None:
    """Write down what is done to a residual, or return None: the numbers are needed."""
    first, *rest = args
    if not isinstance(first, DeferredResidual) or first.here is not None:
        return None
    if func in TIMES_IN_PLACE and not kwargs and isinstance(rest[0], (int, float)):
        first.recipe = ("mul", first.recipe, rest[0])
        return first
    shape, dtype, device = first.shape, first.dtype, first.device
    if (
        func in TIMES
        and not kwargs
        and isinstance(rest[0], (int, float))
        and dtype.is_floating_point
    ):
        recipe: Recipe = ("mul", first.recipe, rest[0])
    elif func is aten.add.Tensor and not kwargs and _is_alike(first, rest[0]):
        other = rest[0]
        is_deferred = isinstance(other, DeferredResidual) and other.here is None
        recipe = ("add", first.recipe, other.recipe if is_deferred else ("tensor", _plain(other)))
        shape = max(shape, other.shape)
        dtype = torch.promote_types(dtype, other.dtype)
    elif func is aten._to_copy.default and kwargs.get("device") in (None, device):
        dtype = kwargs.get("dtype") or dtype
        recipe = ("to", first.recipe, dtype)
    elif func is aten.to.dtype:  # as it comes under inference_mode
        dtype = rest[0]
        recipe = ("to", first.recipe, dtype)
    else:
        return None
    return DeferredResidual.make(recipe, shape=shape, dtype=dtype, device=device)


def _is_alike(residual: DeferredResidual, other: Any) -> bool:
    """Whether the sum with another tensor is the sum of the ranks' tokens."""
    return (
        isinstance(other, torch.Tensor)
        and other.ndim == residual.ndim
        and other.shape[1:] == residual.shape[1:]
        and other.device == residual.device
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.numbers() if isinstance(tensor, DeferredResidual) else tensor


def _follow(recipe: Recipe) -> torch.Tensor:
    kind, first, *rest = recipe
    if kind == "residual":
        out: torch.Tensor = first.residual(rest[0]).clone()
    elif kind == "tensor":
        out = first
    elif kind == "mul":
        out = _follow(first) * rest[0]
    elif kind == "add":
        out = _follow(first) + _follow(rest[0])
    else:
        out = _follow(first).to(rest[0])
    return out


def encode_control(
    control: Mapping[str, Any],
    place: Callable[[str, torch.Tensor], Tree],
    *,
    kept: Container[ControlCall],
    plan: ParallelPlan,
) -> Tree:
    """Turn the residuals of a call into recipes for the workers.

    Args:
        place: puts a tensor that is here into a slot, under a name.
        kept: those that the ranks of now keep; what earlier ones kept is computed here.
        plan: of the call; what was shared by another plan is computed here.
    """
    unique: list[Tree] = []
    known: dict[int, int] = {}

    def is_there(recipe: Recipe) -> bool:
        if recipe[0] == "residual":
            call: ControlCall = recipe[1]
            return call in kept and call.plan == plan
        return recipe[0] == "tensor" or all(
            is_there(part) for part in recipe[1:] if isinstance(part, tuple)
        )

    def tree(recipe: Recipe, num_rows: int) -> Tree:
        kind, first, *rest = recipe
        if kind == "residual":
            return [kind, first.number, rest[0]]
        if kind == "tensor":
            # Rows of the batch may be shared among the ranks: every row must be there.
            whole = first.expand(num_rows, *first.shape[1:])
            return [kind, place(f"control.{len(unique)}", whole)]
        if kind == "to":
            return [kind, tree(first, num_rows), str(rest[0]).removeprefix("torch.")]
        if kind == "mul":
            return [kind, tree(first, num_rows), rest[0]]
        return [kind, tree(first, num_rows), tree(rest[0], num_rows)]

    def number(residual: torch.Tensor | None) -> int | None:
        if residual is None:
            return None
        if id(residual) not in known:
            if isinstance(residual, DeferredResidual):
                is_deferred = residual.here is None and is_there(residual.recipe)
                recipe = residual.recipe if is_deferred else ("tensor", residual.numbers())
                entry = tree(recipe, residual.shape[0])
            else:
                entry = ["tensor", place(f"control.{len(unique)}", residual)]
            known[id(residual)] = len(unique)
            unique.append(entry)
        return known[id(residual)]

    blocks = {name: [number(residual) for residual in part] for name, part in control.items()}
    return {"unique": unique, "blocks": blocks}
