"""The page of what runs in parallel holds every row, with the outcome that the tests ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rig.feature_rows import FALLS_BACK, NOT_HERE, REFUSED, UNSEEN
from rig.feature_table import NODE_PACKS, SECTIONS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "compatibility.json"
ALL = [(title, name) for title, rows in SECTIONS.items() for name in rows]


@pytest.mark.parametrize(("title", "name"), ALL, ids=[f"{t}: {n}" for t, n in ALL])
def test_the_page_says_what_the_tests_ask_for(title, name):
    row, entry = SECTIONS[title][name], json.loads(PAGE.read_text())[title].get(name)
    if entry is None and row.is_slow:
        pytest.skip("takes minutes and was left out of the last run: FEATURES_SLOW=1")
    assert entry is not None
    outcomes = {run["outcome"] for runs in entry["found"].values() for run in runs.values()}
    assert row.outcome in outcomes
    assert outcomes <= {row.outcome, NOT_HERE}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_has_no_rows_that_no_test_runs(title):
    assert set(json.loads(PAGE.read_text())[title]) <= set(SECTIONS[title])


@pytest.mark.parametrize(("title", "name"), ALL, ids=[f"{t}: {n}" for t, n in ALL])
def test_what_falls_back_says_why(title, name):
    row = SECTIONS[title][name]
    if row.outcome in (UNSEEN, REFUSED) or (row.outcome == FALLS_BACK and title != NODE_PACKS):
        assert row.why
    if row.outcome == FALLS_BACK:
        assert row.reason
