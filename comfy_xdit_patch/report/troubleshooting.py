"""The page on troubleshooting as data: which row explains a text, and what its remedy is.

Runs in: host, and the doctor's process. Standard library only. The wheel brings
``docs/troubleshooting.md`` along, beside this file; a checkout has it where it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

NAME = "troubleshooting.md"
HERE = Path(__file__).parent
PLACES = (HERE / NAME, HERE.parents[1] / "docs" / NAME)
VALUE = re.compile("<[^<>]+>")
"""What an entry has where a text has a value."""
CAUSE = "<cause>"
"""A value that is a text of the page itself: at the end of an entry, its row says more."""
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


def row_of(text: str) -> Row | None:
    """The row of a text that the program said, or of the cause that it ends with.

    Of several rows it is the one that has most of the text's words. Line breaks and runs of spaces
    count as one space. What it takes grows with the text's length only: texts hold tracebacks.
    """
    said = " ".join(text.split())
    best: tuple[int, str, Row] | None = None
    for row in rows():
        for entry in row.entries:
            parts = VALUE.split(entry)
            last = _last_value(parts, said)
            num_same = sum(map(len, parts))
            if last is not None and num_same > (best[0] if best else 0):
                is_cause = VALUE.findall(entry) == [CAUSE] and entry.endswith(CAUSE)
                best = num_same, last if is_cause else "", row
    if best is None:
        return None
    _, cause, row = best
    return row_of(cause) or row


def _last_value(parts: list[str], text: str) -> str | None:
    """The last value in a text that is made of these parts with a value between each two.

    Empty if there is no value; None where the text is another one.
    """
    if len(parts) == 1:
        return "" if text == parts[0] else None
    if not text.startswith(parts[0]):
        return None
    begin = len(parts[0])
    for part in parts[1:-1]:  # The first place will do: whatever follows has more text left.
        found = text.find(part, begin + 1)
        if found < 0:
            return None
        begin = found + len(part)
    end = len(text) - len(parts[-1])
    return text[begin:end] if text.endswith(parts[-1]) and end > begin else None


@lru_cache(maxsize=200)
def remedy_of(text: str) -> str | None:
    """What to do about a text that the program said, without marks of links; None if unknown."""
    row = row_of(text)
    return None if row is None else LINK.sub(r"\1", row.remedy)
