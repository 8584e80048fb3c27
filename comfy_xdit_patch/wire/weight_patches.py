"""Carry ComfyUI's weight patches: LoRA, LoKr, LoHa, OFT, merges, as ComfyUI's own lists.

Runs in: host and worker.

A patch is a tuple ``(strength, value, strength_model, offset, function)``; a value is a weight
adapter, a tuple of tensors under a name, or, for a merge, a list that begins with the other model's
weight. The worker gets the same list with the same tensors, and ComfyUI's own ``calculate_weight``
applies it there with the same seeds: the weights are the same bits.

(comfy/lora.py, ``calculate_weight``; comfy/model_patcher.py, ``add_patches``, ``get_key_patches``.)
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch

from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.packs import Packing, check_room
from comfy_xdit_patch.wire.tensors import PLAIN_CLASSES
from comfy_xdit_patch.wire.values import (
    UncarriedValueError,
    as_base,
    decode_value,
    encode_value,
)

Place = Callable[[Sequence[torch.Tensor]], list[Tree]]

# What ``BypassForwardHook`` notes of its layer and strength on its adapter, where it is made.
_BYPASS_NOTES = frozenset(
    (
        "multiplier",
        "is_conv",
        "conv_dim",
        "kernel_size",
        "in_channels",
        "out_channels",
        "kw_dict",
    )
)
# ``get_key_patches`` gives this to weights that need no conversion.
_IDENTITY = "ModelPatcher.get_key_patches.<locals>.<lambda>"


class PatchEncoder:
    """Turns patches into a tree; all tensors are placed together at the end."""

    def __init__(self) -> None:
        from comfy import weight_adapter

        self._adapters = tuple(weight_adapter.adapters)
        self._packing = Packing()
        self._beside: dict[int, Set[str]] = {}
        """What may be on an adapter beside its weights, by the adapter's identity."""
        self.made: list[torch.Tensor] = []
        """Tensors made here. Their copies in shared memory live as long as these do."""

    def encode(self, patches: Mapping[str, Sequence[Any]], place: Place) -> Tree:
        """Turn a ModelPatcher's ``patches`` into a tree.

        Raises:
            UncarriedValueError: a patch holds something that cannot be carried.
            NoRoomError: the patches would take too much memory.
        """
        return self._placed({key: [*map(self._patch, patches[key])] for key in patches}, place)

    def encode_bypass(self, hooks: Mapping[str, Sequence[Any]], place: Place) -> Tree:
        """Turn ComfyUI's bypass hooks, by their module's name, into a tree.

        Raises:
            UncarriedValueError: an adapter holds something that cannot be carried.
            NoRoomError: the adapters would take too much memory.
        """
        found: dict[str, list[Any]] = {}
        for name in hooks:
            found[name] = []
            for hook in hooks[name]:
                if getattr(hook.adapter, "multiplier", None) != hook.multiplier:
                    raise UncarriedValueError("an adapter that bypass hooks share")
                self._beside[id(hook.adapter)] = _BYPASS_NOTES
                found[name].append([float(hook.multiplier), hook.adapter])
        return self._placed(found, place)

    def _placed(self, values: Mapping[str, Any], place: Place) -> Tree:
        tree = encode_value({key: values[key] for key in sorted(values)}, self._other)
        self._packing.place(place)
        return tree

    def _patch(self, patch: Sequence[Any]) -> tuple[Any, ...]:
        """A patch in plain numbers; a merge's other weight is converted."""
        strength, value, strength_model, offset, function = patch
        if isinstance(value, list):
            (weight, convert), *patches = value
            value = [(self._other_weight(weight, convert), _as_it_is), *map(self._patch, patches)]
        where = None if offset is None else tuple(int(number) for number in offset)
        return float(strength), value, float(strength_model), where, function

    def _other_weight(self, weight: torch.Tensor, convert: Any) -> torch.Tensor:
        """The other model's weight in a merge, converted as ``calculate_weight`` would."""
        if getattr(convert, "__qualname__", "") != _IDENTITY:
            import comfy.model_management

            # Conversions read their module (a scale beside the weight), which stays here.
            copy = comfy.model_management.cast_to_device(
                weight, weight.device, torch.float32, copy=True
            )
            weight = convert(copy, inplace=True)
            self.made.append(weight)
            # Once here and once in shared memory.
            check_room(2 * sum(made.nbytes for made in self.made))
        return weight

    def _other(self, _: str, value: Any) -> Tree:
        if isinstance(value, torch.Tensor):
            if type(value) not in PLAIN_CLASSES or value.is_sparse:
                raise UncarriedValueError(f"a tensor of class {type(value).__name__}")
            return self._packing.add(value)
        if type(value) in self._adapters:
            name, notes = type(value).__name__, self._beside.get(id(value), frozenset())
            extra = set(vars(value)) - {"loaded_keys", "weights"} - notes
            if extra:
                raise UncarriedValueError(f"{name}.{min(extra)}")
            return {"$adapter": [name, encode_value(value.weights, self._other)]}
        if isinstance(value, types.FunctionType):
            return {"$function": None if value is _as_it_is else _function_name(value)}
        return encode_value(as_base(value), self._other)


def _function_name(function: types.FunctionType) -> str:
    """Name a function of ComfyUI's own, such as ``swap_scale_shift``.

    Raises:
        UncarriedValueError: it is not a module-level function of ComfyUI.
    """
    module, name = function.__module__ or "", function.__qualname__
    if (
        module.split(".")[0] != "comfy"
        or getattr(importlib.import_module(module), name, None) is not function
    ):
        raise UncarriedValueError(f"the function {name}")
    return f"{module}:{name}"


def decode(tree: Tree, tensor: Callable[[Tree], torch.Tensor]) -> dict[str, list[Any]]:
    """Turn a tree of ``PatchEncoder`` back: lists of patches, or of bypass hooks, by their names.

    Args:
        tensor: finds the tensor behind a place.
    """

    def adapter(inner: Tree) -> Any:
        from comfy import weight_adapter

        name, weights = inner
        (found,) = (c for c in weight_adapter.adapters if c.__name__ == name)
        return found(set(), decode_value(weights, kinds))

    kinds = {"$pack": tensor, "$adapter": adapter, "$function": _function}
    decoded: dict[str, list[Any]] = decode_value(tree, kinds)
    return decoded


def is_quantised(model: Any, key: str) -> bool:
    """Whether a weight is stored otherwise than as its numbers: patches convert it and back."""
    import comfy.model_patcher

    weight, *functions = comfy.model_patcher.get_key_weight(model, key)
    return type(weight) not in PLAIN_CLASSES or functions != [None, None]


def _as_it_is(weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """Convert a weight that the host converted already, or that needs no conversion."""
    return weight


def _function(name: str | None) -> Any:
    if name is None:
        return _as_it_is
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
