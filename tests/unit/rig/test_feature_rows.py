"""The page of what runs in parallel has the rows that tests/e2e/test_features.py holds ranks to.

Its reasons are compared with the package in tests/contract/test_docs.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rig.feature_rows import FALLS_BACK, NOT_HERE, REFUSED, UNSEEN, Row, plain
from rig.feature_table import SECTIONS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "compatibility.json"


def test_the_page_says_what_the_tests_ask_for() -> None:
    page = json.loads(PAGE.read_text())
    assert list(page) == list(SECTIONS)
    misfits = {
        f"{title}: {name}": misfit
        for title, rows in SECTIONS.items()
        for name in {**rows, **page[title]}
        if (misfit := misfit_of(rows.get(name), page[title].get(name)))
    }
    assert misfits == {}


def misfit_of(row: Row | None, entry: dict[str, Any] | None) -> str:
    """Say in what a row and its entry on the page differ; nothing if they do not."""
    if row is None:
        return "no test runs it"
    if entry is None:
        # Takes minutes, and was left out of the last run: FEATURES_SLOW=1.
        return "" if row.is_slow else "not on the page"
    if entry["why"] != row.why:
        return f"why: {entry['why']!r} instead of {row.why!r}"
    runs = [run for of_version in entry["found"].values() for run in of_version.values()]
    outcomes = {run["outcome"] for run in runs} - {NOT_HERE}
    return "" if outcomes == {row.outcome} else f"{outcomes} instead of {row.outcome}"


@pytest.mark.parametrize(
    "texts",
    [{"outcome": FALLS_BACK}, {"outcome": REFUSED, "why": "x"}, {"outcome": UNSEEN}],
    ids=str,
)
def test_a_row_that_would_accept_any_reason_or_gives_none_cannot_be_made(
    texts: dict[str, str],
) -> None:
    with pytest.raises(ValueError, match=r"needs a reason|says why"):
        Row(plain, **texts)
