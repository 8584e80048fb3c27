"""What the status object is by its types, and whether an answer is one.

Runs in: the rig's environment.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from comfy_xdit_patch.report.schema import Status

JSON_NAMES = {int: "int", float: "float", str: "str", bool: "bool", types.NoneType: "null"}


def leaves(kind: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every field of a type, by its path, with the name of its type in JSON.

    ``[]`` is each item of a list, ``{}`` each value of an object whose keys are data.
    """
    kind, suffix = _without_null(kind)
    if is_dataclass(kind):
        if path:
            yield path, f"object{suffix}"
        hints = get_type_hints(kind)
        for field in fields(kind):
            yield from leaves(hints[field.name], f"{path}.{field.name}".lstrip("."))
    elif get_origin(kind) in (list, dict):
        is_list = get_origin(kind) is list
        inner = get_args(kind)[-1]
        if is_dataclass(inner):
            yield path, f"{'list' if is_list else 'object'} of objects{suffix}"
            yield from list(leaves(inner, f"{path}{'[]' if is_list else '{}'}"))[1:]
        else:
            yield path, f"{'list' if is_list else 'object'} of {JSON_NAMES[inner]}{suffix}"
    elif get_origin(kind) is Literal:
        yield path, "one of " + ", ".join(get_args(kind)) + suffix
    else:
        yield path, JSON_NAMES[kind] + suffix


def faults(body: object, kind: Any = Status, path: str = "status") -> list[str]:
    """What is wrong with the JSON of a value of this type: each key must be there, and no other."""
    kind, is_nullable = _without_null(kind)
    if body is None:
        return [] if is_nullable else [f"{path} is null"]
    if is_dataclass(kind):
        if not isinstance(body, dict):
            return [f"{path} is {body!r}"]
        hints = get_type_hints(kind)
        odd = [f"{path}.{name} is odd or missing" for name in sorted(hints.keys() ^ body.keys())]
        inner = (faults(body[n], hints[n], f"{path}.{n}") for n in hints.keys() & body.keys())
        return odd + [fault for found in inner for fault in found]
    if get_origin(kind) in (list, dict):
        if not isinstance(body, get_origin(kind)):
            return [f"{path} is {body!r}"]
        items = body.items() if isinstance(body, dict) else enumerate(typing.cast(list, body))
        return [
            f for key, item in items for f in faults(item, get_args(kind)[-1], f"{path}[{key}]")
        ]
    if get_origin(kind) is Literal:
        return [] if body in get_args(kind) else [f"{path} is {body!r}"]
    is_right = type(body) is kind or (kind is float and type(body) is int)
    return [] if is_right else [f"{path} is {body!r} and not {JSON_NAMES[kind]}"]


def counted(reasons: list[dict[str, Any]]) -> dict[str, int]:
    """Reasons of a status, with their counts."""
    return {each["reason"]: each["count"] for each in reasons}


def decodes(status: dict[str, Any]) -> dict[str, Any]:
    """What a status says of latents that were decoded."""
    return {
        "parallel": status["totals"]["decodes_parallel"],
        "alone": counted(status["decodes_alone"]),
        "last_s": status["last_decode_s"],
    }


def _without_null(kind: Any) -> tuple[Any, str]:
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (each for each in get_args(kind) if each is not types.NoneType)
        return inner, " or null"
    return kind, ""
