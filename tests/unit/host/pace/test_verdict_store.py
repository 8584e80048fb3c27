"""What ``auto`` measured outlives the process, and a damaged file costs a measurement only."""

from __future__ import annotations

import json
import stat

import pytest

from comfy_xdit_patch.host.pace import verdict_store
from comfy_xdit_patch.host.pace.verdict_store import Case, VerdictStore
from comfy_xdit_patch.planning.verdict import Verdict

CASE = Case("2 x cpu, cores 0,1", "Flux, 1000 bytes", "1 x 2^12 tokens")
VERDICT = Verdict("ulysses=2", 0.5, 0.8)


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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "verdicts": []}',
        '{"format": 1, "verdicts": {"k": {"plan": "ring=2", "several_s": 0, "one_s": 1}}}',
        '{"format": 1, "verdicts": {"k": {"plan": "ring=2", "several_s": 1, "one_s": Infinity}}}',
        '{"format": 1, "verdicts": {"k": 3}}',
        '{"format": 1, "verdicts": {"k": {"plan": "magic=2", "several_s": 1, "one_s": 1}}}',
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
    path.write_text(json.dumps({"format": 0, "verdicts": {"k": 1}}))
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
    VerdictStore().keep(CASE, VERDICT)
    shown = verdict_store.report(clear=False)
    assert CASE.key in shown
    assert "ulysses=2 500 ms a step, one 800 ms: ulysses=2 is taken (1.60x)" in shown
    assert "Forgot 1 verdicts" in verdict_store.report(clear=True)
    assert "nothing yet" in verdict_store.report(clear=False)
