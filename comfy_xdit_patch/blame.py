"""Say who has put something into ComfyUI's process, as the user knows it.

Runs in: host and worker. Standard library only.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any


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


def origin(value: Any) -> str:
    """Say where a function, or an object's class, was written: ``pack.module.Class.function``."""
    value = wrapper_of(value) or value
    inner: Any = value
    while inner is not None and not isinstance(inner, (types.FunctionType, type)):
        value, inner = inner, inner_of(inner)
    owner = value if inner is None else inner
    if isinstance(owner, types.FunctionType):
        # Its names may be those of the function that it lies around (functools.wraps).
        module = str(owner.__globals__.get("__name__", ""))
        name = getattr(owner.__code__, "co_qualname", owner.__qualname__)  # from Python 3.11
    else:
        if not hasattr(owner, "__qualname__"):
            owner = type(owner)
        module, name = str(getattr(owner, "__module__", "")), str(owner.__qualname__)
        if owner is type(None):
            return "nothing"
        if module == "builtins" and owner is type(value):
            return f"another {name}"
    # ComfyUI names a pack's module after its path.
    module = module.rpartition("/")[2]
    name = name.replace(".<locals>", "")
    return f"{module}.{name}" if module not in ("", "builtins") else name
