"""Messages broken by chance: some still are messages, most are not.

Runs in: the tests. What is broken follows the structure: fields, types, sizes, and only then bytes.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

from comfy_xdit_patch.errors import ChannelClosedError, MessageError
from comfy_xdit_patch.wire.channel import MAX_MESSAGE_BYTES
from comfy_xdit_patch.wire.messages.codec import Message, decode, encode

HEADER = struct.Struct("!I")
NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 10**400)
STRINGS = (
    "",
    "os",
    "float32",
    "__class__",
    "float8_e4m3fn",
    "../../etc/passwd",
    "\0",
    "\udcff\ud800",
    "%s%n{0}",
    "x" * 5000,
)
KEYS = ("type", "request", "shape", "source", "dtype", "$slot", "$pack", "__proto__", "")


def broken_body(message: Message, chance: random.Random) -> bytes:
    """Return the JSON of a message with one to three things broken in it, or not JSON at all."""
    kind = chance.random()
    if kind < 0.1:
        return _broken_bytes(encode(message), chance)
    body = json.loads(encode(message))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        body = chance.choice(list(CHANGES.values()))(body, chance)
    data = json.dumps(body).encode()
    return _broken_bytes(data, chance) if kind < 0.15 else data


def broken_frame(message: Message, chance: random.Random) -> bytes:
    """Return a message as it travels, broken inside or in its length."""
    body = broken_body(message, chance)
    length = len(body)
    if chance.random() < 0.15:
        length = chance.choice((0, 1, length - 1, length + 1, 1 << 24, (1 << 24) + 1, 2**32 - 1))
    return HEADER.pack(max(length, 0)) + body


def arriving(data: bytes) -> list[Message | Exception]:
    """Return what a receiver is to make of these bytes and of the sender's end after them.

    The last one is the error at which it gives up.
    """
    found: list[Message | Exception] = []
    while len(data) >= HEADER.size:
        (length,) = HEADER.unpack_from(data)
        if length > MAX_MESSAGE_BYTES:
            return [*found, MessageError("too long")]
        body, data = data[HEADER.size :][:length], data[HEADER.size + length :]
        if len(body) < length:
            break
        try:
            found.append(decode(body))
        except MessageError as error:
            return [*found, error]
    return [*found, ChannelClosedError("nothing follows")]


def any_value(chance: random.Random, depth: int = 0) -> Any:
    """Return any JSON."""
    kind = chance.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [any_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 7:
        return {chance.choice(KEYS): any_value(chance, depth + 1) for _ in range(2)}
    plain = (None, True, chance.choice(NUMBERS), chance.choice(STRINGS), 1.5, float("nan"))
    return plain[kind]


def _drop(body: Any, chance: random.Random) -> Any:
    owner, key = _place(body, chance)
    if owner is not None:
        del owner[key]
    return body


def _rename(body: Any, chance: random.Random) -> Any:
    if isinstance(body, dict) and body:
        body[chance.choice(KEYS)] = body.pop(chance.choice(list(body)))
    return body


def _add(body: Any, chance: random.Random) -> Any:
    if isinstance(body, dict):
        body[chance.choice((*KEYS, "extra"))] = any_value(chance)
    return body


def _replace(body: Any, chance: random.Random) -> Any:
    owner, key = _place(body, chance)
    if owner is None or chance.random() < 0.1:
        return any_value(chance)
    owner[key] = any_value(chance)
    return body


def _number(body: Any, chance: random.Random) -> Any:
    """Change a number into another one: the type is right, the value is not."""
    for _ in range(8):
        owner, key = _place(body, chance)
        if owner is not None and type(owner[key]) in (int, float):
            owner[key] = chance.choice(NUMBERS)
            break
    return body


def _repeat(body: Any, chance: random.Random) -> Any:
    """Make a list long, or an item of it many."""
    for _ in range(8):
        owner, key = _place(body, chance)
        if owner is not None and isinstance(owner[key], list):
            owner[key] = copy.deepcopy(owner[key]) * chance.choice((0, 2, 50))
            break
    return body


def _nest(body: Any, chance: random.Random) -> Any:
    owner, key = _place(body, chance)
    value = any_value(chance)
    for _ in range(chance.choice((3, 90, 300))):
        value = [value] if chance.random() < 0.5 else {"$list": value}
    if owner is None:
        return value
    owner[key] = value
    return body


def _retype(body: Any, chance: random.Random) -> Any:
    if isinstance(body, dict) and isinstance(body.get("type"), str):
        body["type"] = chance.choice(("Done", "Loaded", "Stop", "Failed", "Map", "Forward", "Nix"))
    return body


Change = Callable[[Any, random.Random], Any]
CHANGES: dict[str, Change] = {
    "drop": _drop,
    "rename": _rename,
    "add": _add,
    "replace": _replace,
    "number": _number,
    "repeat": _repeat,
    "nest": _nest,
    "retype": _retype,
}


def _place(body: Any, chance: random.Random) -> tuple[Any, Any]:
    """Some place in a tree, as its container and key."""
    found: tuple[Any, Any] = (None, None)
    node = body
    while isinstance(node, (dict, list)) and node:
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        found = (node, key)
        node = node[key]
        if chance.random() < 0.4:
            break
    return found


def _broken_bytes(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return b"\xff"
    place = chance.randrange(len(data))
    kind = chance.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + chance.randbytes(chance.randrange(40)) + data[place:]
    if kind == 3:
        return data + data
    return chance.choice((b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"\xff\xfe", b"\0" * 64))
