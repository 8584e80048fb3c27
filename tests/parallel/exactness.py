"""Run one forward in stock ComfyUI and on ranks, and compare.

Bound (design section 11): relative max error 1e-5 in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from inside.client import Inside

BOUND = 1e-5
# Every larger block is mapped by itself and given back at once, in stock and ranks alike, so that
# the peak of resident memory is the peak of live tensors.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
STRICT = {"XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}


def compare(
    stock: Inside, ranks: Inside, path: str, tmp_path: Path, **case: Any
) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Run one case in both processes; return the relative error and the status before, after."""
    before = ranks.call("forwards:status")
    stock.call("forwards:forward", path=path, out=str(tmp_path / "stock.pt"), **case)
    after = ranks.call("forwards:forward", path=path, out=str(tmp_path / "ranks.pt"), **case)
    expected, got = (torch.load(tmp_path / f"{name}.pt") for name in ("stock", "ranks"))
    assert got.shape == expected.shape
    assert expected.abs().max() > 0.1, "a model that answers zero proves nothing"
    return ((got - expected).abs().max() / expected.abs().max()).item(), before, after
