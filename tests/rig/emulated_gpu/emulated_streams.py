"""What a card's stream may not use yet: data of exchanges that nobody has waited for.

Runs in: every process of a rig server with emulated cards.

An exchange that was begun runs on a stream of its own. Until the computing stream waits for it,
nothing may read what it writes, and nothing may write what it reads: on a card that would be wrong
now and then, and silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_being_written: Counter[int] = Counter()
_being_read: Counter[int] = Counter()


class InFlight:
    """A card's tensor that an exchange writes, or reads."""

    def __init__(self, tensor: Any, *, is_written: bool) -> None:
        self._storages = list(_storages(tensor))
        self._books = _being_written if is_written else _being_read
        self._books.update(self._storages)

    def has_landed(self) -> None:
        """The stream has waited for it."""
        self._books.subtract(self._storages)
        for key in [key for key in self._storages if not self._books[key]]:
            self._books.pop(key, None)


def check(func: Any, args: Any, kwargs: Any) -> None:
    """Fail where an ATen call would compute with what is still on its way."""
    if not (_being_written or _being_read) or func.namespace == "c10d" or is_view(func):
        return
    used = set(_storages((args, kwargs)))
    changed = set(_storages(list(written(func, args, kwargs))))
    if used & _being_written.keys() or changed & _being_read.keys():
        raise RuntimeError(f"{func} uses data of an exchange that the stream has not waited for")


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """What an ATen call changes of what it is given."""
    for argument, value in _named(func, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(value)


def _storages(values: Any) -> Iterator[int]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and hasattr(value, "inner"):
            yield value.inner.untyped_storage()._cdata


def is_view(func: Any) -> bool:
    """Whether an ATen call launches nothing: it returns another look at what it is given."""
    returns = func._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    arguments = func._schema.arguments
    yield from zip(arguments, args, strict=False)
    yield from ((one, kwargs[one.name]) for one in arguments if one.name in kwargs)
