"""Name what a function, a class or a constant is, so that two processes can compare theirs.

Runs in: host and worker. No torch.

Two processes that imported the same files have the same description of a thing if it does the same
in both. Line numbers and addresses are no part of it, and neither is what changes while a process
works: caches, counters, locks.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from comfy_xdit_patch.blame import wrapper_of

MAX_DEPTH = 4
"""A function's closure holds functions, whose closures hold others."""
MAX_ITEMS = 2000
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
BY_TEXT = ("torch.dtype", "torch.device", "torch.layout", "torch.memory_format", "torch.Size")
"""Values of torch's that are known by what they are printed as."""
C_CODE = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
    types.MethodWrapperType,
)
OWN = "comfy_xdit_patch."
_EMPTY = Ellipsis
"""Stands for the value of a cell that is not filled yet."""
_codes: dict[int, tuple[types.CodeType, str]] = {}


def description(value: Any) -> str:
    """Return a short text that is the same for the same thing; empty if it cannot be told."""
    try:
        text = _text(value, MAX_DEPTH)
    except _UntoldError:
        return ""
    return _shortened(text)


def description_of_module(name: str) -> str:
    """Return the description that a module of this name has."""
    return _shortened(f"module {name}")


def unwrapped(value: Any) -> Any:
    """Return what one of our own patch points lies around, or the value itself."""
    while (getattr(wrapper_of(value), "__module__", None) or "").startswith(OWN):
        value = value.__wrapped__
    return value


class Insides:
    """What of a value can be another thing while the value is the same object.

    ``functions`` and ``cells`` are all that a description of the value looks into. If that is not
    all that can change, as in a table, ``is_settled`` is False.
    """

    def __init__(self, value: Any) -> None:
        self.functions: list[types.FunctionType] = []
        self.cells: list[types.CellType] = []
        self.is_settled = self._settle(value, MAX_DEPTH)

    def _settle(self, value: Any, depth: int) -> bool:
        value = unwrapped(value)
        if depth == 0 or type(value) in PLAIN or _type_name(value) in BY_TEXT:
            return True
        if isinstance(value, (enum.Enum, type, types.ModuleType, *C_CODE)):
            return True
        if isinstance(value, types.FunctionType):
            self.functions.append(value)
            self.cells += value.__closure__ or ()
            inner = [
                *(value.__defaults__ or ()),
                *(value.__kwdefaults__ or {}).values(),
                *contents_of(value),
            ]
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            inner = [value.__func__]
        elif isinstance(value, property):
            inner = [value.fget, value.fset]
        elif type(value) in (tuple, frozenset):
            inner = list(value)
        else:
            return False
        return all([self._settle(item, depth - 1) for item in inner])


def contents_of(function: types.FunctionType) -> Iterator[Any]:
    """Yield what a function closes over."""
    yield from map(content_of, function.__closure__ or ())


def content_of(cell: types.CellType) -> Any:
    """Return what is in a cell of a closure."""
    return (held_by(cell) or [_EMPTY])[0]


def held_by(cell: types.CellType) -> list[Any]:
    """Return the one value that is in a cell of a closure, or none: it was never given one."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def found(path: str) -> Any:
    """Return what ``module:path`` names, if its module is imported here; else None."""
    module, _, inner = path.partition(":")
    value: Any = sys.modules.get(module)
    for name in inner.split(".") if inner else ():
        value = vars(value).get(name) if hasattr(value, "__dict__") else None
        value = getattr(value, "__func__", value)
    return value


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those of all functions that are written inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _shortened(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _UntoldError(Exception):
    """A value that holds state, or that has no description."""


def _text(value: Any, depth: int) -> str:
    value = unwrapped(value)
    kind = type(value)
    if depth == 0:
        return kind.__qualname__
    if kind in PLAIN:
        return f"{kind.__name__} {value!r}"
    if isinstance(value, enum.Enum):
        return f"enum {kind.__qualname__}.{value.name}"
    if _type_name(value) in BY_TEXT:
        return str(value)
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    if isinstance(value, types.FunctionType):
        return _function_text(value, depth)
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return f"{kind.__name__} {_text(value.__func__, depth)}"
    if isinstance(value, property):
        return f"property {_text(value.fget, depth)} {_text(value.fset, depth)}"
    if isinstance(value, C_CODE):
        owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
        owned = owner if isinstance(owner, (type, types.ModuleType)) else type(owner)
        return f"C {getattr(owned, '__name__', '')} {value.__name__}"
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.items()]
        return f"partial {_texts(parts, depth)}"
    if kind in (tuple, list):
        return f"{kind.__name__} {_texts(value, depth)}"
    if kind in (set, frozenset):
        return f"set {sorted(_text(item, depth - 1) for item in value)}"
    if isinstance(value, dict):
        return f"dict {sorted(_texts(item, depth) for item in value.items())}"
    inner = inspect.getattr_static(value, "__wrapped__", None)
    if inner is not None or callable(value):
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        within = "" if inner is None else _text(value.__wrapped__, depth - 1)
        return f"{kind.__module__}.{kind.__qualname__} {name} {within}"
    raise _UntoldError


def _texts(values: Iterable[Any], depth: int) -> str:
    items = list(values)
    if len(items) > MAX_ITEMS:
        raise _UntoldError
    return "(" + ", ".join(_text(item, depth - 1) for item in items) + ")"


def _function_text(function: types.FunctionType, depth: int) -> str:
    parts = [function.__module__, function.__qualname__, code_digest(function.__code__)]
    for values in (function.__defaults__, (function.__kwdefaults__ or {}).items()):
        parts += [_text_or_kind(item, depth - 1) for item in values or ()]
    parts += [_text_or_kind(item, depth - 1) for item in contents_of(function)]
    return " ".join(str(part) for part in parts)


def _text_or_kind(value: Any, depth: int) -> str:
    """A cache in a closure is no other function."""
    try:
        return _text(value, depth)
    except _UntoldError:
        return type(value).__qualname__


def code_digest(code: types.CodeType) -> str:
    """Return a digest of what a code object does, whatever its file and lines.

    Not ``marshal``: what that writes depends on how often each part is referred to.
    """
    known = _codes.get(id(code))
    if known is None:
        digest = hashlib.sha256(code.co_code)
        for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
            digest.update(repr(names).encode())
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        digest.update(f"{code.co_name} {counts} {code.co_flags}".encode())
        digest.update(repr([_constant_text(constant) for constant in code.co_consts]).encode())
        known = _codes[id(code)] = code, digest.hexdigest()[:16]
    return known[1]


def _constant_text(constant: Any) -> str:
    if isinstance(constant, types.CodeType):
        return code_digest(constant)
    if isinstance(constant, tuple):
        return repr([_constant_text(item) for item in constant])
    if isinstance(constant, frozenset):  # in the order of this process's hash seed
        return repr(sorted(_constant_text(item) for item in constant))
    return repr(constant)
