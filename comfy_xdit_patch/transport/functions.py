"""Carry a function by where it is written and what it closes over. No code travels.

Runs in: host and worker.

A node's patch is usually a function inside of a method, with the node's settings in its closure.
Here it is named by its module and the path to it in the source, which is read again where it
arrives; its closure's values are carried if they are plain, or functions themselves. Whether the
code found there is the same is checked.

``STATEFUL`` names objects of ComfyUI's own that keep something from one step to the next: they are
made anew where they arrive, once for each number that the host gives them.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import marshal
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from comfy_xdit_patch.transport.calls import Tree
from comfy_xdit_patch.transport.values import (
    UncarriedValueError,
    decode_value,
    encode_value,
    import_package_of,
    package_of,
)

STATEFUL = (("comfy_extras.nodes_flux", "KV_Attn_Input"),)
LOCALS = ".<locals>."
OWN_NODES = "comfy_extras"

Numbers = Callable[[Any], int]
"""Gives a stateful object its number."""
Objects = Callable[[int, Callable[[], Any]], Any]
"""Returns the object of a number, made by the function given if it is new."""


def is_stateful(value: Any) -> bool:
    """Whether a value is an object that keeps state, and is known."""
    return not isinstance(value, types.FunctionType) and name_of(value) in STATEFUL


def name_of(value: Any) -> tuple[str, str]:
    """Module and path of a function, or of an object's class, as other processes find them."""
    owner = value if isinstance(value, types.FunctionType) else type(value)
    return canonical_module(owner.__module__), owner.__qualname__


def canonical_module(name: str) -> str:
    """Return the name under which another process imports a module.

    ComfyUI loads its own nodes from their files, under the file's bare name.
    """
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    folder, base = os.path.split(file)
    if os.path.basename(folder) == OWN_NODES and base.endswith(".py"):
        return f"{OWN_NODES}.{base[:-3]}"
    return name


def encode_callable(value: Any, numbers: Numbers) -> Tree:
    """Turn a function, or an object of ``STATEFUL``, into a tree.

    Raises:
        UncarriedValueError: it, or something it closes over, cannot be found or carried.
    """
    if is_stateful(value):
        return {"$object": [*name_of(value), numbers(value)]}
    if not isinstance(value, types.FunctionType):
        raise UncarriedValueError(f"a {type(value).__name__}")
    named = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        named = getattr(named, name, None)
    if named is value:
        module = canonical_module(value.__module__)
        return {"$name": [module, value.__qualname__, package_of(module)]}
    code = value.__code__
    module, path = value.__globals__.get("__name__", ""), _path_of(value)
    if _find_code(sys.modules.get(module), path) is not code:
        raise UncarriedValueError(f"the function {path}, whose source is not found again")
    cells = [_encode(cell.cell_contents, numbers) for cell in value.__closure__ or ()]
    return {
        "$function": {
            "module": canonical_module(module),
            "package": package_of(module),
            "path": path,
            "digest": _digest(code),
            "cells": cells,
            "defaults": [_encode(item, numbers) for item in value.__defaults__ or ()],
            "attributes": {
                name: _encode(item, numbers)
                for name, item in vars(value).items()
                if isinstance(item, types.FunctionType)
            },
        }
    }


def decode_callable(tree: Tree, objects: Objects) -> Any:
    """Make what ``encode_callable`` described.

    Raises:
        UncarriedValueError: the source here is another one.
    """
    if "$object" in tree:
        module, name, number = tree["$object"]
        return objects(number, getattr(importlib.import_module(module), name))
    if "$name" in tree:
        module, name, package = tree["$name"]
        import_package_of(package)
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    description = tree["$function"]
    import_package_of(description["package"])
    module = importlib.import_module(description["module"])
    code = _find_code(module, description["path"])
    if code is None or _digest(code) != description["digest"]:
        raise UncarriedValueError(f"{description['path']} is another one in this process")
    function = types.FunctionType(
        code,
        vars(module),
        name=code.co_name,
        argdefs=tuple(_decode(item, objects) for item in description["defaults"]) or None,
        closure=tuple(types.CellType(_decode(cell, objects)) for cell in description["cells"]),
    )
    for name, item in description["attributes"].items():
        setattr(function, name, _decode(item, objects))
    return function


def _encode(value: Any, numbers: Numbers) -> Tree:
    if isinstance(value, types.FunctionType) or is_stateful(value):
        return {"$callable": encode_callable(value, numbers)}
    return {"$value": encode_value(value)}


def _decode(tree: Tree, objects: Objects) -> Any:
    if "$callable" in tree:
        return decode_callable(tree["$callable"], objects)
    return decode_value(tree["$value"])


def _path_of(function: types.FunctionType) -> str:
    # ``functools.wraps`` gives a wrapper the name of what it wraps; the code keeps its own.
    return getattr(function.__code__, "co_qualname", function.__qualname__)


def _find_code(module: types.ModuleType | None, path: str) -> types.CodeType | None:
    """Find a function's code by the names on the way to it."""
    outer, *inner = path.split(LOCALS)
    found: Any = module
    for name in outer.split("."):
        found = None if found is None else inspect.getattr_static(found, name, None)
        found = getattr(found, "__func__", found)
    while found is not None and hasattr(found, "__wrapped__"):
        if found.__code__.co_name == outer.rpartition(".")[2]:
            break
        found = found.__wrapped__
    code: types.CodeType | None = getattr(found, "__code__", None)
    for step in inner:
        if code is None or "." in step:
            return None
        candidates = [const for const in _codes_in(code) if const.co_name == step]
        code = candidates[0] if len(candidates) == 1 else None
    return code


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    return (const for const in code.co_consts if isinstance(const, types.CodeType))


def _digest(code: types.CodeType) -> str:
    return hashlib.sha256(marshal.dumps(code.replace(co_filename=""))).hexdigest()
