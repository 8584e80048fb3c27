"""The encoding of messages, and whether what arrives is one.

Runs in: host and worker. No torch.

A message is one JSON object: small, readable in a dump, and decoding one can run no code. Tensors
never travel in a message; they lie in slots (``slots.py``) and a message refers to them.

JSON has its own idea of types, and what a broken worker sends is any JSON. The checks are made once
from the annotations; a message is checked in about a microsecond.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeAlias, get_args

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.wire.messages.replies import FromWorker
from comfy_xdit_patch.wire.messages.requests import FromHost, ModelSource

Check = Callable[[Any], bool]

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
    if origin in (list, tuple):
        check = check_of(inner[0])
        return lambda value: type(value) is origin and all(map(check, value))
    if origin is dict:  # JSON's keys are strings
        check = check_of(inner[1])
        return lambda value: type(value) is dict and all(map(check, value.values()))
    return lambda value: type(value) is hint


def _is_int(value: Any) -> bool:
    return type(value) is int and -INT_LIMIT <= value < INT_LIMIT


Message: TypeAlias = FromHost | FromWorker

_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Message)}
_CHECKS = {cls: checks_of(cls) for cls in (*_TYPES.values(), ModelSource)}


def encode(message: Message) -> bytes:
    """Turn a message into bytes."""
    body: dict[str, Any] = {"type": type(message).__name__}
    for name in message.__slots__:  # Not ``asdict``, which copies the whole tree of a call.
        body[name] = getattr(message, name)
    return json.dumps(body, separators=(",", ":"), default=asdict).encode()


def decode(data: bytes) -> Message:
    """Turn bytes into a message.

    Raises:
        MessageError: the bytes are not a message of ours.
    """
    try:
        body = json.loads(data)
        cls = _TYPES[body.pop("type")]
        if body.get("source") is not None:
            body["source"] = _made(ModelSource, body["source"])
        if "shape" in body:
            body["shape"] = tuple(body["shape"])
        return _made(cls, body)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = str(error)[:MAX_ERROR_CHARS]
        raise MessageError(f"Not a message of comfy-xdit-patch: {text} in {data[:80]!r}") from None


def _made(cls: type[Any], body: dict[str, Any]) -> Any:
    checks = _CHECKS[cls]
    if body.keys() != checks.keys():
        raise ValueError(f"fields {sorted(body)} instead of {sorted(checks)}")
    for name, check in checks.items():
        if not check(body[name]):
            raise ValueError(f"{name} of {cls.__name__} is a {type(body[name]).__name__}")
    return cls(**body)
