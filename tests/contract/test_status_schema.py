"""The status object is frozen, and its page says what it is."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from rig.status_schema import faults, leaves

from comfy_xdit_patch.report.schema import SCHEMA, Counts, RankStatus, Status

PAGE = Path(__file__).resolve().parents[2] / "docs" / "status.md"
FROZEN = {1: "9dc249b81a9f431d"}
"""Of each schema, the digest of its fields. One that was ever published is not changed here."""


def test_another_field_or_type_is_another_schema():
    lines = "\n".join(f"{path} {kind}" for path, kind in sorted(leaves(Status)))
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    assert FROZEN[SCHEMA] == digest, (
        "add one to SCHEMA, freeze it here, and say so in docs/status.md"
    )
    assert max(FROZEN) == SCHEMA


def test_the_page_has_every_field_with_its_type():
    page = PAGE.read_text()
    assert f"**schema {SCHEMA}**" in page
    table = page[page.index("## The object") : page.index("## Other machines")]
    assert re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table, re.MULTILINE) == list(leaves(Status))


def test_the_page_has_every_field_that_other_machines_are_told():
    page = PAGE.read_text()
    table = page[page.index("## Other machines") : page.index("## Metrics")]
    named = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`[^|]+) \|", table, re.M))))
    assert named == Status(state="idle").short().keys()


def test_a_walk_finds_what_is_missing_odd_or_of_another_type():
    body = Status(state="idle", totals=Counts(runs=1)).to_dict()
    assert faults(body) == []
    assert faults({**body, "state": "well"}) == ["status.state is 'well'"]
    assert faults({**body, "more": 1}) == ["status.more is odd or missing"]
    assert faults({**body, "version": None}) == ["status.version is null"]
    assert faults({**body, "totals": {**body["totals"], "runs": 1.5}}) == [
        "status.totals.runs is 1.5 and not int"
    ]
    assert faults({**body, "ranks": [{}]}) == [
        f"status.ranks[0].{name} is odd or missing" for name in sorted(RankStatus.__slots__)
    ]
    del body["reason"]
    assert faults(body) == ["status.reason is odd or missing"]
