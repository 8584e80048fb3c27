"""The page of what runs in parallel holds every row, with the outcome that the tests ask for."""

from __future__ import annotations

import json
from pathlib import Path

from rig.feature_rows import FALLS_BACK, NOT_HERE, REFUSED, UNSEEN
from rig.feature_table import NODE_PACKS, SECTIONS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "compatibility.json"
ALL = [(title, name, row) for title, rows in SECTIONS.items() for name, row in rows.items()]


def test_the_page_says_what_the_tests_ask_for():
    page = json.loads(PAGE.read_text())
    misfits = {}
    for title, name, row in ALL:
        entry = page[title].get(name)
        if entry is None and row.is_slow:
            continue  # Takes minutes, and was left out of the last run: FEATURES_SLOW=1.
        runs = () if entry is None else entry["found"].values()
        outcomes = {run["outcome"] for of_version in runs for run in of_version.values()}
        if row.outcome not in outcomes or not outcomes <= {row.outcome, NOT_HERE}:
            misfits[f"{title}: {name}"] = (row.outcome, outcomes)
    assert misfits == {}


def test_the_page_has_no_rows_that_no_test_runs():
    page = json.loads(PAGE.read_text())
    assert {title: sorted(set(page[title]) - set(rows)) for title, rows in SECTIONS.items()} == {
        title: [] for title in SECTIONS
    }


def test_what_falls_back_says_why():
    for title, name, row in ALL:
        if row.outcome in (UNSEEN, REFUSED) or (row.outcome == FALLS_BACK and title != NODE_PACKS):
            assert row.why, f"{title}: {name}"
        if row.outcome == FALLS_BACK:
            assert row.reason, f"{title}: {name}"
