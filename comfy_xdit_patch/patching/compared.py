"""Names that host and ranks both have, and whether the same stands under them in the host.

Runs in: host process. Reads modules and classes, changes nothing.

What stands under a name is described and compared once; after that it is enough that it is the same
object with the same code. 3,000 identities are asked in a tenth of a millisecond if no frame of
Python's runs for each.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

from comfy_xdit_patch.blame import whose
from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.transport.describing import description, description_of_module, found
from comfy_xdit_patch.transport.likeness import Reached


class Compared:
    """Names that were compared, with the objects that were found here under them."""

    def __init__(self, reached: Reached) -> None:
        self._rows: list[_Row] = []
        for names, is_around_blocks in ((reached.in_blocks, False), (reached.around, True)):
            for container, members in names.items():
                if container.partition(":")[0] not in sys.modules:
                    continue  # Nobody here has imported it, so nobody has replaced it.
                owner = getattr(found(container), "__dict__", {})
                self._rows += [
                    _Row(container, name, owner, text, is_around_blocks)
                    for name, text in members.items()
                ]
        self._refusals: list[Refusal] = []
        self._look(self._rows)

    def changes(self, *, is_first: bool) -> list[Refusal]:
        """Return what is different now.

        Args:
            is_first: look into tables and closures too. Once a run.
        """
        if is_first:
            self._look(self._rows)
        elif not self._is_as_seen():
            self._look([row for row in self._rows if not row.is_as_seen()])
        return self._refusals

    def _look(self, rows: Iterable[_Row]) -> None:
        for row in rows:
            row.look()
        self._refusals = [row.refusal for row in self._rows if row.refusal is not None]
        # Two kinds of mapping, whose ``get`` is called without a frame of Python's for each.
        plain = [row for row in self._rows if type(row.owner) is dict]
        proxies = [row for row in self._rows if type(row.owner) is not dict]
        self._seen = [
            (getter, [r.owner for r in rows], [r.name for r in rows], [r.value for r in rows])
            for getter, rows in ((dict.get, plain), (types.MappingProxyType.get, proxies))
        ]
        functions = [row for row in self._rows if isinstance(row.value, types.FunctionType)]
        self._functions = [row.value for row in functions]
        self._codes = [row.code for row in functions]

    def _is_as_seen(self) -> bool:
        return all(
            all(map(is_, map(getter, owners, names), values))  # type: ignore[arg-type]
            for getter, owners, names, values in self._seen
        ) and all(map(is_, map(_CODE, self._functions), self._codes))


_CODE = types.FunctionType.__dict__["__code__"].__get__


class _Row:
    """One name, and what is under it here. ``value`` is None where nothing is."""

    __slots__ = ("_container", "_is_around", "_text", "code", "name", "owner", "refusal", "value")

    def __init__(
        self,
        container: str,
        name: str,
        owner: Mapping[str, Any],
        text: str,
        is_around_blocks: bool,
    ) -> None:
        self._container = container
        self._text = text
        self._is_around = is_around_blocks
        self.owner = owner
        self.name = name
        self.value: Any = None
        self.code: Any = None
        self.refusal: Refusal | None = None

    def is_as_seen(self) -> bool:
        value = self.owner.get(self.name)
        return value is self.value and getattr(value, "__code__", None) is self.code

    def look(self) -> None:
        """Compare what is here now with what the ranks have."""
        self.value = self.owner.get(self.name)
        self.code = getattr(self.value, "__code__", None)
        self.refusal = None
        if description(self.value) == self._text:
            return
        path = f"{self._container.replace(':', '.')}.{self.name}"
        if self.value is None and self._text == description_of_module(path):
            return  # not imported here
        self.refusal = Refusal(
            f"{path} was replaced by {whose(self.value)}", is_around_blocks=self._is_around
        )
