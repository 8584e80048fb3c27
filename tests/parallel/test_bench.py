"""``python install.py bench``: its rows, its arguments, and the smallest of its pieces for real."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from bench import call_overhead, decoding, steps, suite
from bench.rows import Row, compared, text_of
from rig.trees import Tree

from comfy_xdit_patch import __version__
from comfy_xdit_patch.check.model_file import Sizes

FIELDS = {
    "name": str,
    "value": (float, int, type(None)),
    "unit": str,
    "baseline": (float, int, type(None)),
    "ratio": (float, int, type(None)),
    "spread": (list, type(None)),
    "parity": (str, type(None)),
}


def check(row: dict[str, Any]) -> None:
    """Hold a row of ``bench.json`` to its schema."""
    assert list(row) == list(FIELDS)
    for name, kind in FIELDS.items():
        assert isinstance(row[name], kind), (name, row)
    assert (row["ratio"] is None) == (row["spread"] is None)
    if row["ratio"] is not None:
        lower, upper = row["spread"]
        assert lower <= row["ratio"] <= upper
        assert row["value"] > 0
        assert row["baseline"] > 0
    if row["value"] is None:
        assert row["parity"], "a row without a figure says why"


def test_a_row_is_of_medians_and_its_ratio_is_of_rounds() -> None:
    row = compared("a", "s", [2.0, 4.0, 30.0], [4.0, 4.0, 10.0], "1e-7")
    assert row == Row("a", 4.0, "s", 4.0, 1.0, (0.75, 2.0), "1e-7")
    assert compared("a", "s", [1.0], [2.0]).spread == (0.5, 0.5)
    check(json.loads(json.dumps(dataclasses.asdict(row))))
    assert "| a | 4 s | 4 s | 1 | 0.75 to 2 | 1e-7 |" in text_of([row])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "stepz"], "invalid choice: 'stepz' (choose from"),
        (["--quik"], "unrecognized arguments: --quik"),
        (["--out", __file__], f"{__file__} is not a directory"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        suite.main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.newest_only
def test_the_cost_of_a_call_is_measured_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_overhead, "NUM_WARM_UP", 1)
    monkeypatch.setattr(call_overhead, "QUICK_CALLS", 3)
    assert suite.main(["--quick", "--only", "overhead", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["versions"]["comfy-xdit-patch"] == __version__
    assert found["hardware"]["cores"] >= 1
    (row,) = found["rows"]
    check(row)
    assert row["unit"] == "ms"
    assert row["value"] < row["baseline"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.newest_only
def test_a_turn_of_a_strategy_is_parallel_and_tells_times_and_bytes(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "NARROW", Sizes(256, 1, 1))
    with steps._setup(tree, is_quick=True) as (setup, _):
        setup = dataclasses.replace(setup, size_px=128, num_steps=2)
        (way,) = [way for way in steps.ways_for(2, has_threads=False) if way.name == "ulysses"]
        turn = steps._turn(setup, way)
    assert turn.step_s > 0
    assert turn.outside_ms > 0
    assert turn.inside_ms > 0
    assert turn.rank_bytes > 0
    assert turn.latent.isfinite().all()


@pytest.mark.newest_only
@pytest.mark.thorough
def test_decoding_is_measured_whole_and_in_tiles(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [decoding.Case(1024, tile, 32, "bfloat16") for tile in (0, 64)]
    monkeypatch.setattr(decoding, "TRUE", cases)
    whole, tiled = decoding.rows(tree, is_quick=False)
    for row in (whole, tiled):
        check(json.loads(json.dumps(dataclasses.asdict(row))))
    assert whole.parity is not None
    assert 0 < float(whole.parity) < 0.06
    assert tiled.parity == "same bits"
