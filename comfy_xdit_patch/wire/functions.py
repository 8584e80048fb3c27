"""Carry a function by where it is written and what it closes over. No code travels.

Runs in: host and worker.

A node's patch is usually a function inside of a method, with the node's settings in its closure.
Here it is named by its module and its place in the source, which is read again where it arrives;
its closure's values are carried if they are plain, or functions and modules themselves. Whether the
code found there is the same is checked.

Functions may refer to each other and to themselves: each has a number, and is made once.
``torch.compiler.disable`` around a function is left out: nothing is compiled where it arrives.
``STATEFUL`` names objects of ComfyUI's own that keep something from one step to the next: they are
made anew where they arrive, once for each number that the host gives them.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

from comfy_xdit_patch.wire.describing import code_digest, held_by
from comfy_xdit_patch.wire.messages.requests import Tree
from comfy_xdit_patch.wire.modules import (
    canonical_module,
    code_at,
    decode_module,
    encode_module,
    place_of,
)
from comfy_xdit_patch.wire.values import (
    Kinds,
    UncarriedValueError,
    decode_value,
    encode_value,
    refuse,
)

STATEFUL = (("comfy_extras.nodes_flux", "KV_Attn_Input"),)
DYNAMO = "_torchdynamo_"
"""What torch's compiler notes on functions begins with it."""
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial)

Numbers = Callable[[Any], int]
"""Gives a stateful object its number."""
Objects = Callable[[int, Callable[[], Any]], Any]
"""Returns the object of a number, made by the function given if it is new."""


def is_stateful(value: Any) -> bool:
    """Whether a value is an object that keeps state, and is known."""
    return not isinstance(value, types.FunctionType) and name_of(value) in STATEFUL


def name_of(value: Any) -> tuple[str, str]:
    """Module and path of a function, or of an object's class, as other processes find them.

    Of a function these are where its code is written: ``functools.wraps`` gives a wrapper the name
    of what it wraps.
    """
    if isinstance(value, types.FunctionType):
        path = getattr(value.__code__, "co_qualname", value.__qualname__)
        return canonical_module(str(value.__globals__.get("__name__", ""))), path
    return canonical_module(type(value).__module__), type(value).__qualname__


def undisabled(value: Any) -> Any:
    """What ``torch.compiler.disable`` was put around, or the value itself."""
    while getattr(value, f"{DYNAMO}disable", False):
        inner = getattr(value, f"{DYNAMO}orig_callable", None)
        if inner is None:
            break
        value = inner
    return value


def closed_over(function: types.FunctionType) -> list[Any]:
    """What a function's closure holds. A name that was never given a value holds nothing."""
    return [value for cell in function.__closure__ or () for value in held_by(cell)]


def encode_callable(value: Any, numbers: Numbers) -> Tree:
    """Turn a function, or an object of ``STATEFUL``, into a tree.

    Raises:
        UncarriedValueError: it, or something it closes over, cannot be found or carried.
    """
    return _Encoder(numbers).callable(value)


def decode_callable(tree: Tree, objects: Objects) -> Any:
    """Make what ``encode_callable`` described.

    Raises:
        UncarriedValueError: the source here is another one.
    """
    return _Decoder(objects).value(tree)


class _Encoder:
    """One tree. A function that was met before is referred to by its number."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._known: dict[int, int] = {}

    def callable(self, value: Any) -> Tree:
        value = undisabled(value)
        if is_stateful(value):
            return {"$object": [*name_of(value), self._numbers(value)]}
        if isinstance(value, functools.partial):
            return {"$partial": self.value([value.func, value.args, value.keywords])}
        if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            raise UncarriedValueError(f"a {type(value).__name__}")
        if id(value) in self._known:
            return {"$again": self._known[id(value)]}
        named = _named(value)
        if named is not None:
            return named
        if not isinstance(value, types.FunctionType):
            raise UncarriedValueError(f"the function {value.__name__}")
        return {"$function": self._function(value)}

    def value(self, value: Any) -> Tree:
        return encode_value(value, self._other)

    def _other(self, path: str, value: Any) -> Tree:
        if isinstance(value, FUNCTIONS) or is_stateful(value):
            return self.callable(value)
        if isinstance(value, types.ModuleType):
            return {"$module": encode_module(value.__name__)}
        return refuse(path, value)

    def _function(self, function: types.FunctionType) -> Tree:
        code = function.__code__
        module = sys.modules.get(str(function.__globals__.get("__name__")))
        is_own = module is not None and function.__globals__ is vars(module)
        place = place_of(code, module) if is_own else None
        if module is None or place is None:
            path = name_of(function)[1]
            raise UncarriedValueError(f"the function {path}, whose source is not found again")
        number = self._known[id(function)] = len(self._known)
        return {
            "number": number,
            "module": encode_module(module.__name__),
            "place": list(place),
            "path": name_of(function)[1],
            "digest": code_digest(code),
            "cells": self.value([held_by(cell) for cell in function.__closure__ or ()]),
            "defaults": self.value(function.__defaults__),
            "keyword_defaults": self.value(function.__kwdefaults__),
            "attributes": self.value(
                {n: item for n, item in vars(function).items() if not n.startswith(DYNAMO)}
            ),
        }


class _Decoder:
    """One tree of ``_Encoder``."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._made: dict[int, types.FunctionType] = {}
        self._kinds: Kinds = {
            "$object": self._object,
            "$partial": self._partial,
            "$again": self._made.__getitem__,
            "$name": lambda inner: _find(*inner),
            "$function": self._function,
            "$module": decode_module,
        }

    def value(self, tree: Tree) -> Any:
        return decode_value(tree, self._kinds)

    def _object(self, inner: Tree) -> Any:
        module, name, number = inner
        return self._objects(number, getattr(importlib.import_module(module), name))

    def _partial(self, inner: Tree) -> Any:
        function, args, keywords = self.value(inner)
        return functools.partial(function, *args, **keywords)

    def _function(self, description: Tree) -> types.FunctionType:
        module = decode_module(description["module"])
        code = code_at(module, tuple(description["place"]))
        if code is None or code_digest(code) != description["digest"]:
            raise UncarriedValueError(f"{description['path']} is another one in this process")
        cells = [types.CellType() for _ in description["cells"]]
        function = types.FunctionType(code, vars(module), code.co_name, None, tuple(cells))
        # Made before what it refers to, which may be itself.
        self._made[description["number"]] = function
        for cell, held in zip(cells, description["cells"], strict=True):
            for value in self.value(held):
                cell.cell_contents = value
        function.__defaults__ = self.value(description["defaults"])
        function.__kwdefaults__ = self.value(description["keyword_defaults"])
        vars(function).update(self.value(description["attributes"]))
        return function


def _named(value: Any) -> Tree | None:
    """Name a function that its module has under its name; None if it has another one there."""
    module = sys.modules.get(value.__module__ or "")
    found: Any = module
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if module is None or found is not value:
        return None
    return {"$name": [encode_module(module.__name__), value.__qualname__, _digests(value)]}


def _find(module: Tree, name: str, digests: list[str]) -> Any:
    found: Any = decode_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None or _digests(found) != digests:
        raise UncarriedValueError(f"{name} is another one in this process")
    return found


def _digests(value: Any) -> list[str]:
    """Name what a function does, and what the one does that ``functools.wraps`` put it around."""
    found = []
    while isinstance(value, types.FunctionType):
        found.append(code_digest(value.__code__))
        value = getattr(value, "__wrapped__", None)
    return found
