"""The encoding of messages, and whether what arrives is one.

Runs in: host and worker. No torch.

A message is one JSON object: small, readable in a dump, and decoding one can run no code. Tensors
never travel in a message; they lie in slots (``slots.py``) and a message refers to them.

JSON has its own idea of types, and what a broken worker sends is any JSON. Checks, and what makes
tuples and values with fields of JSON's lists and objects, are made once from the annotations; a
message is checked in about a microsecond.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, TypeAlias, get_args

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.wire.messages.replies import FromWorker
from comfy_xdit_patch.wire.messages.requests import FromHost, ModelSource, Residence

Check = Callable[[Any], bool]
Read = Callable[[Any], Any]

INT_LIMIT = 1 << 63
"""Integers are 64 bits wide: a larger one cannot be turned into a float, a size or a number of
bytes without an exception of its own."""


MAX_ERROR_CHARS = 300
MAX_START_BYTES = 1 << 20
"""Of one ``Start`` and of what the nursery answers to it."""


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
    if origin is Literal:
        return lambda value: value in inner
    if origin in (list, tuple):
        check = check_of(inner[0])
        return lambda value: type(value) is origin and all(map(check, value))
    if origin is dict:  # JSON's keys are strings
        check = check_of(inner[1])
        return lambda value: type(value) is dict and all(map(check, value.values()))
    return lambda value: type(value) is hint


def reads_of(cls: type[Any]) -> dict[str, Read]:
    """Return what makes those fields of a dataclass that JSON has no type for."""
    hints = typing.get_type_hints(cls).items()
    return {name: read for name, hint in hints if (read := read_of(hint)) is not None}


def read_of(hint: Any) -> Read | None:
    """Return what makes a field's value of JSON's, or None where they are the same."""
    if isinstance(hint, type) and is_dataclass(hint):
        return lambda value: _made(hint, value)
    if typing.get_origin(hint) is tuple:
        return tuple
    if typing.get_origin(hint) is types.UnionType:
        for read in filter(None, map(read_of, typing.get_args(hint))):
            return lambda value: None if value is None else read(value)
    return None


def _is_int(value: Any) -> bool:
    return type(value) is int and -INT_LIMIT <= value < INT_LIMIT


Message: TypeAlias = FromHost | FromWorker

_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Message)}
_WITH_FIELDS: tuple[type[Any], ...] = (*_TYPES.values(), ModelSource, Residence)
_CHECKS = {cls: checks_of(cls) for cls in _WITH_FIELDS}
_READS = {cls: reads_of(cls) for cls in _WITH_FIELDS}
_encode = json.JSONEncoder(separators=(",", ":"), default=asdict).encode


def encode(message: Message) -> bytes:
    """Turn a message into bytes."""
    body: dict[str, Any] = {"type": type(message).__name__}
    for name in message.__slots__:  # Not ``asdict``, which copies the whole tree of a call.
        body[name] = getattr(message, name)
    return _encode(body).encode()


def decode(data: bytes) -> Message:
    """Turn bytes into a message.

    Raises:
        MessageError: the bytes are not a message of ours.
    """
    try:
        body = json.loads(data)
        return _made(_TYPES[body.pop("type")], body)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = str(error)[:MAX_ERROR_CHARS]
        raise MessageError(f"Not a message of comfy-xdit-patch: {text} in {data[:80]!r}") from None


def _made(cls: type[Any], body: dict[str, Any]) -> Any:
    checks = _CHECKS[cls]
    if body.keys() != checks.keys():
        raise ValueError(f"fields {sorted(body)} instead of {sorted(checks)}")
    for name, read in _READS[cls].items():
        body[name] = read(body[name])
    for name, check in checks.items():
        if not check(body[name]):
            raise ValueError(f"{name} of {cls.__name__} is a {type(body[name]).__name__}")
    return cls(**body)
