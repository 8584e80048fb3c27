"""Run one forward in stock ComfyUI and on ranks, and compare.

Runs in: pytest; stock ComfyUI, and the one with ranks, are processes of their own.

Bound (design section 11): relative max error 1e-5 in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from inside.client import Inside

BOUND = 1e-5
STRICT = {"XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}


def compare(
    stock: Inside, ranks: Inside, path: str, tmp_path: Path, **case: Any
) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Run one case in both processes; return the relative error and the status before, after."""
    before = ranks.call("forwards:status")
    expected = answer_of(stock, "forwards:forward", tmp_path, path=path, **case)
    after = ranks.call("forwards:forward", path=path, out=str(tmp_path / "ranks.pt"), **case)
    got = torch.load(tmp_path / "ranks.pt")
    assert got.shape == expected.shape
    assert expected.abs().max() > 0.1, "a model that answers zero proves nothing"
    return ((got - expected).abs().max() / expected.abs().max()).item(), before, after


_answers: dict[tuple[int, str, str], Any] = {}


def answer_of(stock: Inside, body: str, tmp_path: Path, **case: Any) -> Any:
    """What stock ComfyUI computes; one process is asked once, for it answers the same again."""
    written = Path(case["path"]).stat().st_mtime_ns
    key = stock.process.pid, body, json.dumps({**case, "written": written}, sort_keys=True)
    if key not in _answers:
        stock.call(body, out=str(tmp_path / "stock.pt"), **case)
        _answers[key] = torch.load(tmp_path / "stock.pt")
    return _answers[key]
