"""Names that host and ranks both have, and whether the same stands under them in the host.

Runs in: host process. Reads modules and classes, changes nothing.

What stands under a name is described and compared once; after that the host only asks whether it
is still the same object. Two thousand names take a tenth of a millisecond, because no Python frame
runs for each name; half of them are names that a class does not have itself and inherits. Once a
run the host looks at what can change inside of an object.
"""

from __future__ import annotations

import gc
import itertools
import sys
import types
from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

from comfy_xdit_patch.blame import origin
from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.wire.describing import (
    Insides,
    content_of,
    description,
    description_of_module,
    found,
)
from comfy_xdit_patch.wire.messages.replies import Reached

_SET_ON_FUNCTIONS = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_ABSENT = object()


class Compared:
    """Names that were compared, with the objects that were found here under them."""

    def __init__(self, reached: Reached) -> None:
        self._rows: list[_Row] = []
        self.found: list[Refusal] = []
        """What was different at the last look."""
        for names, is_around_blocks in ((reached.in_blocks, False), (reached.around, True)):
            for container, members in names.items():
                if container.partition(":")[0] not in sys.modules:
                    continue  # Nobody here has imported it, so nobody has replaced it.
                # Code of ours that runs here computes with torch's functions too.
                is_around = is_around_blocks and not container.startswith("torch")
                owner = _dict_of(found(container))
                self._rows += [
                    _Row(container, name, owner, text, is_around) for name, text in members.items()
                ]
        self._look(self._rows)

    def changes(self, *, is_first: bool) -> list[Refusal]:
        """Look, and return what is different now.

        Args:
            is_first: look into functions, tables and closures too. Once a run.
        """
        if is_first and not self._is_same_inside():
            self._look(self._rows)
        elif not self._is_as_seen():
            self._look([row for row in self._rows if row.has_another()])
        if is_first:
            self._look(self._unsettled)
        return self.found

    def _look(self, rows: Iterable[_Row]) -> None:
        if not any([row.look() for row in rows]):
            return
        self.found = [row.refusal for row in self._rows if row.refusal is not None]
        present = [row for row in self._rows if row.value is not _ABSENT]
        self._owners = [row.owner for row in present]
        self._names = [row.name for row in present]
        self._values = [row.value for row in present]
        absent: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for row in self._rows:
            if row.value is _ABSENT:
                absent.setdefault(id(row.owner), (row.owner, set()))[1].add(row.name)
        self._without = [owner for owner, _ in absent.values()]
        self._absent = [frozenset(names) for _, names in absent.values()]
        self._unsettled = [row for row in present if not row.insides.is_settled]
        self._functions = [one for row in present for one in row.insides.functions]
        self._cells = [one for row in present for one in row.insides.cells]
        self._inside = self._what_is_inside()

    def _is_as_seen(self) -> bool:
        found_here = map(dict.get, self._owners, self._names)
        return all(map(is_, found_here, self._values)) and all(
            map(frozenset.isdisjoint, self._absent, self._without)
        )

    def _is_same_inside(self) -> bool:
        return all(map(is_, self._what_is_inside(), self._inside))

    def _what_is_inside(self) -> list[Any]:
        of_functions = map(_SET_ON_FUNCTIONS, self._functions)
        return [*itertools.chain.from_iterable(of_functions), *map(content_of, self._cells)]


def _dict_of(container: Any) -> dict[str, Any]:
    """Return the dict of a module or class itself. That of a class lies behind a proxy."""
    names = getattr(container, "__dict__", {})
    if isinstance(names, types.MappingProxyType):
        (names,) = gc.get_referents(names)
    assert type(names) is dict
    return names


class _Row:
    """One name, and what is under it here."""

    __slots__ = (
        *("_container", "_is_around", "_now", "_text", "insides", "name", "owner", "refusal"),
        "value",
    )

    def __init__(
        self,
        container: str,
        name: str,
        owner: dict[str, Any],
        text: str,
        is_around_blocks: bool,
    ) -> None:
        self._container = container
        self._text = text
        self._is_around = is_around_blocks
        self.owner = owner
        self.name = name
        self.value: Any = _ABSENT
        self._now: str | None = None
        self.refusal: Refusal | None = None

    def has_another(self) -> bool:
        """Whether another object is here than the last time."""
        return self.owner.get(self.name, _ABSENT) is not self.value

    def look(self) -> bool:
        """Compare what is here now with what the ranks have.

        Returns:
            Whether it is another thing than the last time.
        """
        value = self.owner.get(self.name, _ABSENT)
        now = None if value is _ABSENT else value
        text = description(now)
        if value is self.value and text == self._now:
            return False
        self.value, self._now = value, text
        self.insides = Insides(now)
        self.refusal = self._refusal(now)
        return True

    def _refusal(self, now: Any) -> Refusal | None:
        if self._now == self._text:
            return None
        path = f"{self._container.replace(':', '.')}.{self.name}"
        if now is None and self._text == description_of_module(path):
            return None  # not imported here
        return Refusal(f"{path} was replaced by {origin(now)}", is_around_blocks=self._is_around)
