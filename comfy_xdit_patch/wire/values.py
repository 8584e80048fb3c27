"""The one codec of trees: carry Python values in what JSON has words for.

Runs in: host and worker.

Plain values, lists and dictionaries with texts for keys are themselves. All else is a dictionary
with one key that begins with ``$``, the kind: tuples, dtypes, enums and classes here, and what the
caller has words for, such as tensors in shared memory, functions, and adapters of LoRAs.

Classes travel by name and are imported where they arrive (``modules.py``).
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.modules import decode_module, encode_module
from comfy_xdit_patch.wire.tensors import dtype_name, dtype_of

PLAIN = (bool, int, float, str, type(None))
BASES: tuple[Any, ...] = (int, float, str, list, tuple, dict)

Encode = Callable[[str, Any], Tree]
"""Turns a value at a path, of a kind that is not known here, into a tree."""
Kinds = Mapping[str, Callable[[Any], Any]]
"""By the kind with its ``$``: what a tree's inner part stands for."""


class UncarriedValueError(TypeError):
    """A value cannot be carried to another process."""


def refuse(_: str, value: Any) -> Tree:
    """Have no words for anything else."""
    raise UncarriedValueError(f"a {type(value).__name__}")


def encode_value(value: Any, other: Encode = refuse, path: str = "") -> Tree:
    """Turn a value into a tree.

    Args:
        other: has words for values of other kinds.
        path: where the value is; what is inside of it is at ``path.0``, ``path.key``.

    Raises:
        UncarriedValueError: there are no words for a value.
    """
    cls = type(value)
    if cls in PLAIN:
        return value
    if cls in (list, tuple, set):
        items = [encode_value(item, other, f"{path}.{i}") for i, item in enumerate(value)]
        return items if cls is list else {f"${cls.__name__}": items}
    if cls is dict:
        pairs = [
            [encode_value(key), encode_value(item, other, f"{path}.{key}")]
            for key, item in value.items()
        ]
        is_tree = all(type(key) is str and not key.startswith("$") for key in value)
        return dict(pairs) if is_tree else {"$dict": pairs}
    if isinstance(value, torch.dtype):
        return {"$dtype": dtype_name(value)}
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, enum.Enum):
        return {"$enum": [encode_class(cls), value.value]}
    if isinstance(value, type):
        return {"$class": encode_class(value)}
    return other(path, value)


def as_base(value: Any) -> Any:
    """A number, text or collection of a class of its own as the plain one that it is made of.

    Raises:
        UncarriedValueError: it is none.
    """
    for base in BASES:
        if isinstance(value, base):
            return base(value)
    return refuse("", value)


def decode_value(tree: Tree, kinds: Kinds | None = None) -> Any:
    """Turn a tree of ``encode_value`` back.

    Args:
        kinds: those that ``other`` had words for.
    """
    if isinstance(tree, list):
        return [decode_value(item, kinds) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree), "")
    if not kind.startswith("$"):
        return {key: decode_value(item, kinds) for key, item in tree.items()}
    inner = tree[kind]
    if kinds is not None and kind in kinds:
        return kinds[kind](inner)
    if kind == "$dtype":
        return dtype_of(inner)
    if kind == "$size":
        return torch.Size(inner)
    if kind == "$enum":
        return decode_class(inner[0])(inner[1])
    if kind == "$class":
        return decode_class(inner)
    items = decode_value(inner, kinds)
    return {"$tuple": tuple, "$set": set, "$dict": dict}[kind](items)


def encode_class(cls: type[Any]) -> Tree:
    """Name a class, and where its package lies.

    Raises:
        UncarriedValueError: it cannot be found under its name.
    """
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not cls:
        raise UncarriedValueError(f"the class {cls.__qualname__}, which has no importable name")
    return [encode_module(cls.__module__), cls.__qualname__]


def decode_class(tree: Tree) -> Any:
    """Import a class named by ``encode_class``."""
    module, name = tree
    found: Any = decode_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
