"""How much of the tests runs: one of each mechanism, or everything (``--all``).

Runs in: the tests (standard library only).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

T = TypeVar("T")

WHOLE = "RIG_ALL"
"""Set by ``tests/conftest.py`` for all of its processes where ``--all`` was given."""


def is_whole() -> bool:
    """Whether everything runs."""
    return WHOLE in os.environ


def how_many(default: int, *, whole: int, variable: str = "") -> int:
    """Return how many inputs a test takes; a variable of the environment decides first."""
    return int(os.environ.get(variable, whole if is_whole() else default))


def sampled(rows: Mapping[str, T], every: int) -> dict[str, T]:
    """Return every so many-th row of a table, from the first on; with ``--all`` every row."""
    return dict(list(rows.items())[:: 1 if is_whole() else every])


def one_of_each(rows: Mapping[str, T], kind: Callable[[T], Hashable]) -> dict[str, T]:
    """Return the first row of each kind, in the table's order."""
    seen: set[Hashable] = set()
    found = {}
    for name, row in rows.items():
        if kind(row) not in seen:
            seen.add(kind(row))
            found[name] = row
    return found
