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
from comfy_xdit_patch.wire.packs import check_room
from comfy_xdit_patch.wire.tensors import PLAIN_CLASSES

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


class UncarriedPatchError(TypeError):
    """A weight patch holds something that cannot be carried to another process."""


class PatchEncoder:
    """Turns patches into a tree; all tensors are placed together at the end."""

    def __init__(self) -> None:
        from comfy import weight_adapter

        self._adapters = tuple(weight_adapter.adapters)
        self._tensors: list[torch.Tensor] = []
        self.made: list[torch.Tensor] = []
        """Tensors made here. Their copies in shared memory live as long as these do."""

    def encode(self, patches: Mapping[str, Sequence[Any]], place: Place) -> Tree:
        """Turn a ModelPatcher's ``patches`` into a tree.

        Raises:
            UncarriedPatchError: a patch holds something that cannot be carried.
            NoRoomError: the patches would take too much memory.
        """
        tree = {key: [self._patch(patch) for patch in patches[key]] for key in sorted(patches)}
        return _fill(tree, place(self._tensors))

    def encode_bypass(self, hooks: Mapping[str, Sequence[Any]], place: Place) -> Tree:
        """Turn ComfyUI's bypass hooks, by their module's name, into a tree.

        Raises:
            UncarriedPatchError: an adapter holds something that cannot be carried.
            NoRoomError: the adapters would take too much memory.
        """
        tree: dict[str, Tree] = {}
        for name in sorted(hooks):
            tree[name] = []
            for hook in hooks[name]:
                if getattr(hook.adapter, "multiplier", None) != hook.multiplier:
                    raise UncarriedPatchError("an adapter that bypass hooks share")
                adapter = self._adapter(hook.adapter, _BYPASS_NOTES)
                tree[name].append([float(hook.multiplier), adapter])
        return _fill(tree, place(self._tensors))

    def _patch(self, patch: Sequence[Any]) -> Tree:
        strength, value, strength_model, offset, function = patch
        return [
            float(strength),
            self._value(value),
            float(strength_model),
            None if offset is None else [int(number) for number in offset],
            None if function is None else _function_name(function),
        ]

    def _value(self, value: Any) -> Tree:
        if isinstance(value, list):
            (weight, convert), *patches = value
            return {
                "$model": [self._other_weight(weight, convert), *map(self._patch, patches)],
            }
        if type(value) in self._adapters:
            return self._adapter(value)
        return self._part(value)

    def _adapter(self, adapter: Any, notes: Set[str] = frozenset()) -> Tree:
        name = type(adapter).__name__
        if type(adapter) not in self._adapters:
            raise UncarriedPatchError(f"a {name}")
        extra = set(vars(adapter)) - {"loaded_keys", "weights"} - notes
        if extra:
            raise UncarriedPatchError(f"{name}.{min(extra)}")
        return {"$adapter": name, "weights": self._part(adapter.weights)}

    def _other_weight(self, weight: torch.Tensor, convert: Any) -> Tree:
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
        return self._part(weight)

    def _part(self, part: Any) -> Tree:
        if isinstance(part, torch.Tensor):
            if type(part) not in PLAIN_CLASSES or part.is_sparse:
                raise UncarriedPatchError(f"a tensor of class {type(part).__name__}")
            self._tensors.append(part)
            return {"$tensor": len(self._tensors) - 1}
        if isinstance(part, (tuple, list)):
            kind = "$tuple" if isinstance(part, tuple) else "$list"
            return {kind: [self._part(item) for item in part]}
        if isinstance(part, dict) and all(isinstance(key, str) for key in part):
            return {"$dict": {key: self._part(item) for key, item in part.items()}}
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        raise UncarriedPatchError(f"a {type(part).__name__}")


def _fill(tree: Tree, places: Sequence[Tree]) -> Tree:
    """Put the tensors' places where their numbers stand."""
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return places[tree["$tensor"]]
        return {key: _fill(item, places) for key, item in tree.items()}
    return [_fill(item, places) for item in tree] if isinstance(tree, list) else tree


def _function_name(function: Any) -> str:
    """Name a function of ComfyUI's own, such as ``swap_scale_shift``.

    Raises:
        UncarriedPatchError: it is not a module-level function of ComfyUI.
    """
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if (
        not isinstance(function, types.FunctionType)
        or module.split(".")[0] != "comfy"
        or getattr(importlib.import_module(module), name, None) is not function
    ):
        raise UncarriedPatchError(f"the function {name or type(function).__name__}")
    return f"{module}:{name}"


def decode(tree: Tree, tensor: Callable[[Tree], torch.Tensor]) -> dict[str, list[Any]]:
    """Turn a tree of ``PatchEncoder.encode`` into a ModelPatcher's ``patches``.

    Args:
        tensor: finds the tensor behind a place.
    """

    def value(node: Tree) -> Any:
        if isinstance(node, dict) and "$model" in node:
            weight, *patches = node["$model"]
            return [(_part(weight, tensor), _as_it_is), *map(patch, patches)]
        return _part(node, tensor)

    def patch(node: Tree) -> tuple[Any, ...]:
        strength, inner, strength_model, offset, function = node
        return (
            strength,
            value(inner),
            strength_model,
            None if offset is None else tuple(offset),
            None if function is None else _function(function),
        )

    return {key: [patch(item) for item in patches] for key, patches in tree.items()}


def decode_bypass(
    tree: Tree, tensor: Callable[[Tree], torch.Tensor]
) -> list[tuple[str, float, Any]]:
    """Turn a tree of ``PatchEncoder.encode_bypass`` into modules' names, strengths, adapters."""
    return [
        (name, multiplier, _part(adapter, tensor))
        for name, hooks in tree.items()
        for multiplier, adapter in hooks
    ]


def _part(node: Tree, tensor: Callable[[Tree], torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "$pack" in node:
        return tensor(node)
    if "$tuple" in node:
        return tuple(_part(item, tensor) for item in node["$tuple"])
    if "$list" in node:
        return [_part(item, tensor) for item in node["$list"]]
    if "$dict" in node:
        return {key: _part(item, tensor) for key, item in node["$dict"].items()}
    from comfy import weight_adapter

    (adapter,) = (c for c in weight_adapter.adapters if c.__name__ == node["$adapter"])
    return adapter(set(), _part(node["weights"], tensor))


def is_quantised(model: Any, key: str) -> bool:
    """Whether a weight is stored otherwise than as its numbers: patches convert it and back."""
    import comfy.model_patcher

    weight, *functions = comfy.model_patcher.get_key_weight(model, key)
    return type(weight) not in PLAIN_CLASSES or functions != [None, None]


def _as_it_is(weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """Convert a weight that the host converted already, or that needs no conversion."""
    return weight


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
