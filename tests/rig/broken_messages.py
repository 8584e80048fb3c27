"""Messages of every type, and what is left of them when something in them is broken.

Runs in: the tests, by hypothesis. What is broken follows the structure: fields, types, sizes, and
only then bytes. A failure prints what reproduces it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import resource
import struct
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from comfy_xdit_patch.errors import ChannelClosedError, MessageError, XditError
from comfy_xdit_patch.wire.channel import MAX_MESSAGE_BYTES
from comfy_xdit_patch.wire.messages.codec import INT_LIMIT, Message, decode, encode
from rig.breadth import how_many, is_whole

T = TypeVar("T")

HEADER = struct.Struct("!I")
MAX_GROWTH_KB = 300 << 10

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates among them: paths
KEYS = st.sampled_from(["type", "request", "shape", "dtype", "$slot", "$pack", "__class__"]) | TEXTS
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("x" * 5000)
ANY_JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return what makes values of an annotation of a message."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(map(values_of, inner))
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (list, tuple):
        return st.lists(values_of(inner[0]), max_size=4).map(origin)
    if origin is dict:
        return st.dictionaries(TEXTS, values_of(inner[1]), max_size=3)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: values_of(one) for name, one in hints.items()})
    return {
        Any: ANY_JSON,
        int: st.integers(-INT_LIMIT, INT_LIMIT - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: TEXTS,
        bool: st.booleans(),
        types.NoneType: st.none(),
    }[hint]


def tried(examples: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Try so many inputs, the same ones each time; with ``--all`` ten times as many, by chance."""
    return settings(
        max_examples=how_many(examples, whole=10 * examples),
        derandomize=not is_whole(),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def broken_bodies(draw: st.DrawFn, messages: st.SearchStrategy[Message]) -> bytes:
    """The JSON of a message with up to three things broken in it, or not JSON at all."""
    body = json.loads(encode(draw(messages)))
    for _ in range(draw(st.integers(0, 3))):
        body = _broken(draw, body)
    data = json.dumps(body).encode()
    place = draw(st.integers(0, len(data)))
    return draw(
        st.sampled_from([data] * 12)
        | st.sampled_from([data[:place], data + data, b"[" * 20_000, b"9" * 5000])
        | st.binary(max_size=40).map(lambda noise: data[:place] + noise + data[place:])
    )


def _broken(draw: st.DrawFn, body: Any) -> Any:
    """Drop, rename, add, replace, repeat or nest something, at some depth."""
    value = draw(ANY_JSON)
    owner: Any = None
    node, key = body, None
    while isinstance(node, (dict, list)) and node and (owner is None or draw(st.booleans())):
        owner, key = (
            node,
            draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node)))),
        )
        node = owner[key]
    if owner is None:
        return value
    match draw(st.sampled_from(["drop", "name", "value", "number", "repeat", "nest"])):
        case "drop":
            del owner[key]
        case "name" if isinstance(owner, dict):
            owner[draw(KEYS)] = node if draw(st.booleans()) else owner.pop(key)
        case "number" if type(node) in (int, float):
            owner[key] = draw(st.integers() | st.floats() | st.just(10**400))
        case "repeat" if isinstance(node, list):
            owner[key] = node * draw(st.sampled_from([0, 2, 50]))
        case "nest":
            for _ in range(draw(st.sampled_from([3, 90, 300]))):
                value = [value]
            owner[key] = value
        case _:
            owner[key] = value
    return body


@st.composite
def broken_frames(draw: st.DrawFn, messages: st.SearchStrategy[Message]) -> bytes:
    """A message as it travels, broken inside or in its length."""
    body = draw(broken_bodies(messages))
    right = len(body)
    wrong = [
        0,
        1,
        max(right - 1, 0),
        right + 1,
        MAX_MESSAGE_BYTES,
        MAX_MESSAGE_BYTES + 1,
        2**32 - 1,
    ]
    return HEADER.pack(draw(st.just(right) | st.sampled_from([*[right] * 20, *wrong]))) + body


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


def outcome_of(call: Callable[[], T]) -> T | XditError:
    """Return what a call returns, or the exception of ours that it raises."""
    try:
        return call()
    except XditError as error:
        return error


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """No descriptor is left by any input, memory stays within bounds, nothing is said."""
    before = len(os.listdir("/proc/self/fd"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
    gc.collect()  # An exception that a test keeps refers to the frame that keeps it.
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < MAX_GROWTH_KB
