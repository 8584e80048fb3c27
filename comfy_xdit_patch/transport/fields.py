"""Whether a decoded message's fields have the types that their dataclass names.

Runs in: host and worker. No torch.

JSON has its own idea of types, and what a broken worker sends is any JSON. The checks are made once
from the annotations; a message is checked in about a microsecond.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]

INT_LIMIT = 1 << 63
"""Integers are 64 bits wide: a larger one cannot be turned into a float, a size or a number of
bytes without an exception of its own."""


def checks_of(cls: type[Any]) -> dict[str, Check]:
    """Return the check of each field of a dataclass."""
    return {name: check_of(hint) for name, hint in typing.get_type_hints(cls).items()}


def check_of(hint: Any) -> Check:
    """Return what tells values of an annotation from others.

    A float may be an int: JSON writes ``1.0`` as ``1`` in other languages, and so do people. A bool
    is no int. Floats are finite.
    """
    if hint is Any:
        return lambda _: True
    if hint is int:
        return _is_int
    if hint is float:
        return lambda value: _is_int(value) or (type(value) is float and math.isfinite(value))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [check_of(option) for option in inner]
        return lambda value: any(check(value) for check in options)
    if origin in (list, tuple):
        check = check_of(inner[0])
        return lambda value: type(value) is origin and all(map(check, value))
    if origin is dict:  # JSON's keys are strings
        check = check_of(inner[1])
        return lambda value: type(value) is dict and all(map(check, value.values()))
    return lambda value: type(value) is hint


def _is_int(value: Any) -> bool:
    return type(value) is int and -INT_LIMIT <= value < INT_LIMIT
