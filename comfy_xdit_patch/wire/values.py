"""Carry plain Python values that JSON has no word for: dtypes, sizes, tuples, enums, classes.

Runs in: host and worker.

Classes travel by name and are imported where they arrive (``modules.py``).
"""

from __future__ import annotations

import enum
import sys
from typing import Any

import torch

from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.modules import decode_module, encode_module

PLAIN = (bool, int, float, str, type(None))


class UncarriedValueError(TypeError):
    """A value cannot be carried to another process."""


def encode_value(value: Any) -> Tree:
    """Turn a value into a tree.

    Raises:
        UncarriedValueError: it is of another type.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, enum.Enum):
        return {"$enum": [encode_class(type(value)), value.value]}
    if isinstance(value, type):
        return {"$class": encode_class(value)}
    if isinstance(value, (tuple, list, set)):
        return {f"${type(value).__name__}": [encode_value(item) for item in value]}
    if type(value) is dict:
        return {"$dict": [[encode_value(k), encode_value(v)] for k, v in value.items()]}
    raise UncarriedValueError(f"a {type(value).__name__}")


def decode_value(tree: Tree) -> Any:
    """Turn a tree of ``encode_value`` back."""
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "$dtype":
        return getattr(torch, inner)
    if kind == "$size":
        return torch.Size(inner)
    if kind == "$enum":
        return decode_class(inner[0])(inner[1])
    if kind == "$class":
        return decode_class(inner)
    if kind == "$dict":
        return {decode_value(k): decode_value(v) for k, v in inner}
    return {"$tuple": tuple, "$list": list, "$set": set}[kind](decode_value(i) for i in inner)


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
