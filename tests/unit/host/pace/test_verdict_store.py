"""What ``auto`` measured outlives the process, and a damaged file costs a measurement only."""

from __future__ import annotations

import json
import math
import stat

import pytest

from comfy_xdit_patch.host.pace import verdict_store
from comfy_xdit_patch.host.pace.case import Case
from comfy_xdit_patch.host.pace.verdict_store import VerdictStore
from comfy_xdit_patch.planning.verdict import DAY_S, NUM_RUNS, ONE, Pace, Verdict

CASE = Case("2 x cpu, cores 0,1", "Flux, 1000 bytes", "1 x 2^12 tokens")
NOW_S = 1_800_000_000.0
PACES = {"ulysses=2": Pace(0.5, 0.51), ONE: Pace(0.8, 0.84)}
VERDICT = Verdict(PACES, NOW_S)


def test_a_verdict_is_found_by_the_next_process(tmp_path):
    path = tmp_path / "not there yet" / "verdicts.json"
    assert VerdictStore(path).find(CASE) is None
    VerdictStore(path).keep(CASE, VERDICT)
    assert VerdictStore(path).find(CASE) == VERDICT
    assert VerdictStore(path).find(Case("another", CASE.model, CASE.size)) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["verdicts.json"]


def test_without_a_home_it_lasts_as_long_as_the_process(monkeypatch):
    monkeypatch.setattr(verdict_store, "cache_directory", lambda: None)
    store = VerdictStore()
    store.keep(CASE, VERDICT)
    store.keep(Case("m", "n", "s"), VERDICT)
    assert store.find(CASE) == VERDICT
    assert VerdictStore().find(CASE) is None
    assert store.clear() == 0
    assert verdict_store.report(clear=False).startswith("Nothing is kept: this user has no home")


def test_two_processes_do_not_lose_each_others(tmp_path):
    path = tmp_path / "verdicts.json"
    first, second = VerdictStore(path), VerdictStore(path)
    assert first.find(CASE) is second.find(CASE) is None
    other = Case("m", "n", "s")
    first.keep(CASE, VERDICT)
    second.keep(other, VERDICT)
    assert VerdictStore(path).all() == {CASE.key: VERDICT, other.key: VERDICT}


def test_the_oldest_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict_store, "MAX_VERDICTS", 2)
    store = VerdictStore(tmp_path / "verdicts.json")
    cases = [Case("m", "n", str(number)) for number in range(3)]
    for case in (*cases[:2], cases[0], cases[2]):
        store.keep(case, VERDICT)
    assert list(store.all()) == [cases[0].key, cases[2].key]


def kept(paces, *, unix_s=1.0, num_runs=0):
    """A file with one verdict."""
    pairs = {way: {"fastest_s": a, "median_s": b} for way, (a, b) in paces.items()}
    verdict = {"paces": pairs, "unix_s": unix_s, "num_runs": num_runs}
    return json.dumps({"format": 2, "verdicts": {"k": verdict}})


def test_a_file_like_those_below_is_read_where_it_is_well(tmp_path):
    path = tmp_path / "verdicts.json"
    path.write_text(kept({"ring=2": [1, 1.5], "one": [2, 2]}, num_runs=7))
    verdict = Verdict({"ring=2": Pace(1, 1.5), ONE: Pace(2, 2)}, 1.0, 7)
    assert VerdictStore(path).all() == {"k": verdict}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 2, "verdicts": []}',
        '{"format": 2, "verdicts": {"k": 3}}',
        kept({"ring=2": [0, 1], "one": [1, 1]}),
        kept({"ring=2": [1, math.inf], "one": [1, 1]}),
        kept({"ring=2": [1, 0.9], "one": [1, 1]}),
        kept({"magic=2": [1, 1], "one": [1, 1]}),
        kept({"ring=2": [1, 1]}),
        kept({"ring=2": [1, 1], "one": [1, 1]}, unix_s=math.nan),
        kept({"ring=2": [1, 1], "one": [1, 1]}, num_runs=None),
    ],
)
def test_a_damaged_file_is_said_and_begun_anew(tmp_path, caplog, text):
    path = tmp_path / "verdicts.json"
    path.write_text(text)
    store = VerdictStore(path)
    assert store.all() == {}
    assert "cannot be read and is begun anew" in caplog.text
    store.keep(CASE, VERDICT)
    assert VerdictStore(path).find(CASE) == VERDICT


def test_the_file_of_another_format_is_begun_anew(tmp_path):
    path = tmp_path / "verdicts.json"
    old = {"plan": "ring=2", "several_s": 1, "one_s": 2}
    path.write_text(json.dumps({"format": 1, "verdicts": {"k": old}}))
    assert VerdictStore(path).all() == {}


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = VerdictStore(tmp_path / "file" / "verdicts.json")
    store.keep(CASE, VERDICT)
    assert "cannot be kept" in caplog.text
    assert store.find(CASE) == VERDICT


def test_the_command_shows_and_clears(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "nothing yet" in verdict_store.report(clear=False)
    monkeypatch.setattr(verdict_store.time, "time", lambda: NOW_S + 3 * 3600)
    VerdictStore().keep(CASE, VERDICT)
    shown = verdict_store.report(clear=False)
    assert CASE.key in shown
    assert "ulysses=2 500 ms a step (+2%), one 800 ms a step (+5%); 3.0 h ago" in shown
    assert "ulysses=2 is taken (1.60x of one); measured again once the ranks are" in shown
    assert "Forgot 1 verdicts" in verdict_store.report(clear=True)
    assert "nothing yet" in verdict_store.report(clear=False)


@pytest.mark.parametrize(
    ("seconds", "num_runs", "age_s", "follows"),
    [
        (
            {ONE: 0.4},
            0,
            0,
            "one is taken (0.80x of one); measured again in 24.0 h, or after 50 run",
        ),
        ({ONE: 0.4}, 38, 3600, "measured again in 23.0 h, or after 12 runs"),
        ({ONE: 0.4}, NUM_RUNS, 0, "measured again in the next run"),
        ({ONE: 0.4}, 0, DAY_S, "measured again in the next run"),
        ({"ring=2": 0.4}, 0, 0, "ring=2 is taken; measured again with one"),
        ({ONE: 0.6, "ring=2": 0.4}, 0, 0, "ring=2 is taken (1.50x of one); measured again once"),
    ],
)
def test_the_command_says_what_follows(tmp_path, monkeypatch, seconds, num_runs, age_s, follows):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verdict_store.time, "time", lambda: NOW_S + age_s)
    paces = {way: Pace(s, s) for way, s in ({"ulysses=2": 0.5} | seconds).items()}
    VerdictStore().keep(CASE, Verdict(paces, NOW_S, num_runs))
    assert follows in verdict_store.report(clear=False)
