"""Say who has put something into ComfyUI's process, as the user knows it.

Runs in: host and worker. Standard library only.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from pathlib import Path
from typing import Any

NODE_PACKS = "custom_nodes"
NOBODY = "another extension"


def inner_of(value: Any) -> Any:
    """Return the function in a method, a property, a partial or a wrapper; None if it is none."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.partial):
        return value.func
    return inspect.getattr_static(value, "__wrapped__", None)


def wrapper_of(value: Any) -> Any:
    """Return the function that wrapt calls around another one; None for what is no such wrapper."""
    if not type(value).__name__.endswith("FunctionWrapper"):
        return None
    wrapper = getattr(value, "_self_wrapper", None)
    return getattr(wrapper, "__func__", wrapper)


def whose(value: Any) -> str:
    """Return the node pack or the package that a thing comes from.

    A file under ``custom_nodes`` says which pack; else the module's top package.
    """
    inner: Any = wrapper_of(value) or value
    while inner is not None and not isinstance(inner, (types.FunctionType, type)):
        value, inner = inner, inner_of(inner)
    source = value if inner is None else inner
    if isinstance(source, types.FunctionType):
        pack = _pack_of(source.__code__.co_filename)
        module = str(source.__globals__.get("__name__", ""))
    else:
        module = (source if isinstance(source, type) else type(source)).__module__
        pack = _pack_of(getattr(sys.modules.get(module), "__file__", None) or "")
    if pack is not None:
        return f"the node pack {pack}"
    package = module.partition(".")[0]
    return NOBODY if package in ("", "builtins", "__main__") else package


def _pack_of(file: str) -> str | None:
    parts = Path(file).parts
    if NODE_PACKS not in parts[:-1]:
        return None
    return parts[parts.index(NODE_PACKS) + 1].removesuffix(".py")
