"""The page on troubleshooting as data: which row explains a text, and what its remedy is.

Runs in: host, and the doctor's process. Standard library only. The wheel brings
``docs/troubleshooting.md`` along, beside this file; a checkout has it where it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAME = "troubleshooting.md"
HERE = Path(__file__).parent
PLACES = (HERE / NAME, HERE.parents[1] / "docs" / NAME)
VALUE = re.compile("<[^<>]+>")
"""What an entry has where a text has a value."""
LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the page's tables: texts that share a remedy."""

    section: str
    entries: tuple[str, ...]
    lasts: str | None
    """None where the table has no such column."""
    cause: str
    remedy: str


@cache
def rows() -> tuple[Row, ...]:
    """Every row whose first cell is one or more texts in code marks, a line each."""
    page = next(place for place in PLACES if place.is_file())
    found = []
    section = ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if line.startswith("| `"):
            first, *lasts, cause, remedy = (cell.strip() for cell in line.strip("|").split(" | "))
            entries = tuple(entry.strip("`") for entry in first.split("<br>"))
            found.append(Row(section, entries, lasts[0] if lasts else None, cause, remedy))
    return tuple(found)


@cache
def _patterns() -> tuple[tuple[int, re.Pattern[str], Row], ...]:
    """How much of a text an entry gives word for word, what it looks like, and its row."""
    return tuple(
        (
            len(VALUE.sub("", entry)),
            re.compile(".+?".join(map(re.escape, VALUE.split(entry))), re.DOTALL),
            row,
        )
        for row in rows()
        for entry in row.entries
    )


def row_of(text: str) -> Row | None:
    """The row of a text that the program said: of several, the one that has most of its words.

    Line breaks and runs of spaces count as one space.
    """
    said = " ".join(text.split())
    found = [
        (length, row) for length, pattern, row in _patterns() if length and pattern.fullmatch(said)
    ]
    return max(found, key=lambda item: item[0])[1] if found else None


@cache
def remedy_of(text: str) -> str | None:
    """What to do about a text that the program said, without marks of links; None if unknown."""
    row = row_of(text)
    return None if row is None else LINK.sub(r"\1", row.remedy)
