"""The forward on ranks equals the forward of stock ComfyUI in another process.

Bound (design section 11): relative max error 1e-5 in float32. Each case also shows that every rank
took part and that bytes moved between ranks as the plan says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from exactness import BOUND, STRICT, compare
from inside.client import Inside
from rig.trees import Tree

CASES = {
    "square": {"height": 16, "width": 16, "batch": 1, "text_tokens": 256},
    "72x104 px, 257 tokens": {"height": 9, "width": 13, "batch": 1, "text_tokens": 257},
    "1000x616 px": {"height": 125, "width": 77, "batch": 1, "text_tokens": 256},
    "700 tokens": {"height": 16, "width": 16, "batch": 1, "text_tokens": 700},
    "batch 2": {"height": 16, "width": 12, "batch": 2, "text_tokens": 256},
    "batch 3": {"height": 16, "width": 12, "batch": 3, "text_tokens": 256},
    "batch 4": {"height": 16, "width": 12, "batch": 4, "text_tokens": 256},
    "two references": {
        "height": 16,
        "width": 16,
        "batch": 1,
        "text_tokens": 256,
        "refs": [[9, 9], [16, 8]],
    },
    "ControlNet": {"height": 18, "width": 14, "batch": 1, "text_tokens": 40, "control": 63},
    "ControlNet and references, batch 3": {
        "height": 18,
        "width": 14,
        "batch": 3,
        "text_tokens": 40,
        "control": 63,
        "refs": [[9, 9]],
    },
    "ControlNet on fewer tokens than the image has": {
        "height": 18,
        "width": 14,
        "batch": 1,
        "text_tokens": 40,
        "control": 20,
    },
    "attention mask": {"height": 18, "width": 14, "batch": 1, "text_tokens": 40, "mask": True},
    "attention mask and references, batch 2": {
        "height": 18,
        "width": 14,
        "batch": 2,
        "text_tokens": 40,
        "mask": True,
        "refs": [[9, 9]],
    },
    "references by index": {
        "height": 16,
        "width": 16,
        "batch": 2,
        "text_tokens": 256,
        "refs": [[11, 9]],
        "ref_method": "index",
    },
}


@pytest.mark.every_version
@pytest.mark.parametrize("num_ranks", [pytest.param(5, marks=pytest.mark.thorough), 3])
def test_forward_equals_stock_in_every_shape(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    num_ranks: int,
    record_property: Callable[[str, object], None],
) -> None:
    # hidden 768 is 6 heads: equal on 2 and 3 ranks, unequal on 5.
    path = flux_dev(hidden=768, double=1, single=1)
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS=f"cpu:{num_ranks}", **STRICT)
    for name, case in CASES.items():
        error, before, after = compare(stock, ranks, path, tmp_path, **case)
        record_property(f"{tree.version} {num_ranks} ranks, {name}", error)
        assert error <= BOUND, name
        assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
        for rank in range(num_ranks):
            forwards = [s["ranks"][rank]["forwards"] for s in (before, after)]
            assert forwards[1] == forwards[0] + 1
        moved = after["totals"]["bytes_between_ranks"] - before["totals"]["bytes_between_ranks"]
        # A batch that the ranks divide needs no communication at all; a mask has one row for all.
        is_divided = case["batch"] % num_ranks == 0 and case["batch"] > 1
        assert (moved == 0) == (is_divided and "mask" not in case), name
