"""A ControlNet's residual that exists on the workers only.

Runs in: host process.

ComfyUI multiplies it by a strength and adds another ControlNet's to it. That is written down, and
the workers do it on their own tokens. Anything else needs the numbers: then ComfyUI's own
ControlNet computes them here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch

from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.step.lazy_tensor import LazyTensor
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.recipes import Leaves, Recipe, arithmetic, follow, written
from comfy_xdit_patch.wire.tensors import dtype_name

aten = torch.ops.aten
TIMES = (aten.mul.Tensor, aten.mul.Scalar)
TIMES_IN_PLACE = (aten.mul_.Tensor, aten.mul_.Scalar)
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


class DeferredResidual(LazyTensor):
    """A residual by its recipe."""

    recipe: Recipe

    @staticmethod
    def make(
        recipe: Recipe, *, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> DeferredResidual:
        """Return the residual of a recipe."""
        made = DeferredResidual.empty(shape, dtype=dtype, device=device)
        made.recipe = recipe
        return made

    def compute(self) -> torch.Tensor:
        """Follow the recipe here. A copy: the numbers may be changed in place later."""
        leaves: Leaves = {
            "residual": lambda call, index: call.residual(index).clone(),
            "tensor": lambda tensor: tensor,
        }
        numbers: torch.Tensor = follow(self.recipe, leaves, arithmetic)
        return numbers

    @classmethod
    def record(
        cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> DeferredResidual | None:
        """Write down what is done to a residual, or return None: the numbers are needed."""
        first, *rest = args
        if not isinstance(first, DeferredResidual) or first.here is not None:
            return None
        is_times = not kwargs and bool(rest) and isinstance(rest[0], (int, float))
        if func in TIMES_IN_PLACE and is_times:
            first.recipe = ("mul", first.recipe, rest[0])
            return first
        recipe: Recipe
        shape, dtype, device = first.shape, first.dtype, first.device
        if func in TIMES and is_times and dtype.is_floating_point:
            recipe = ("mul", first.recipe, rest[0])
        elif func is aten.add.Tensor and not kwargs and _is_alike(first, rest[0]):
            other = rest[0]
            recipe = ("add", first.recipe, _recipe(other))
            shape = max(shape, other.shape)
            dtype = torch.promote_types(dtype, other.dtype)
        elif func is aten._to_copy.default and kwargs.get("device") in (None, device):
            dtype = kwargs.get("dtype") or dtype
            recipe = ("to", first.recipe, dtype_name(dtype))
        elif func is aten.to.dtype:  # as it comes under inference_mode
            dtype = rest[0]
            recipe = ("to", first.recipe, dtype_name(dtype))
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


def _recipe(tensor: torch.Tensor) -> Recipe:
    if isinstance(tensor, DeferredResidual) and tensor.here is None:
        return tensor.recipe
    return _leaf(tensor)


def _leaf(tensor: torch.Tensor) -> Recipe:
    return ("tensor", tensor.numbers() if isinstance(tensor, LazyTensor) else tensor)


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

    def tree(recipe: Recipe, rows: Sequence[int]) -> Tree:
        def placed(tensor: torch.Tensor) -> Tree:
            # Rows of the batch may be shared among the ranks: every row must be there.
            is_whole = tensor.shape[:1] == rows
            whole = tensor if is_whole else tensor.expand(*rows, *tensor.shape[1:])
            return ["tensor", place(f"control.{len(unique)}", whole)]

        def numbered(call: ControlCall, index: int) -> Tree:
            return ["residual", call.number, index]

        return follow(recipe, {"residual": numbered, "tensor": placed}, written)

    def number(residual: torch.Tensor | None) -> int | None:
        if residual is None:
            return None
        if id(residual) not in known:
            recipe = _recipe(residual)
            if not is_there(recipe):
                recipe = _leaf(residual)
            known[id(residual)] = len(unique)
            unique.append(tree(recipe, residual.shape[:1]))
        return known[id(residual)]

    blocks = {name: [number(residual) for residual in part] for name, part in control.items()}
    return {"unique": unique, "blocks": blocks}
