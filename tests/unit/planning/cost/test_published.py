"""The cost model against published times; docs/planning.md shows the same rows."""

from __future__ import annotations

import pytest
from rig.planning_tables import PAGE, page
from rig.published import ROWS, median_error

WITHIN = 0.1


def test_the_median_of_all_published_rows_is_within_a_tenth():
    assert len(ROWS) >= 45
    assert median_error(ROWS) <= WITHIN


def test_rows_that_set_no_constant_are_met_as_well():
    rows = [row for row in ROWS if row.use == "test" and not row.remark]
    assert len(rows) >= 14
    assert median_error(rows) <= WITHIN


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.source} {row.gpus} {row.plan}")
def test_a_row_beyond_a_tenth_says_why(row):
    is_met = abs(row.error) <= WITHIN
    assert is_met == (not row.remark), f"{row.error:+.0%}: {row.remark or 'no remark'}"


def test_no_row_that_is_explained_by_its_remark_set_a_constant():
    assert all(row.use == "test" for row in ROWS if row.remark)


def test_the_page_shows_these_rows():
    assert PAGE.read_text() == page(), "run: cd tests && python -m rig.planning_tables"
