"""Columns of ComfyUI's own single blocks that wait for an exchange have the bits of the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from inside.client import Inside
from rig.trees import Tree

CAST, FP8 = "manual_cast", "float8_e4m3fn"


@pytest.mark.every_version
def test_stored_and_cast_weights_leave_columns_and_the_results_are_equal(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    process = inside(tree, XDIT_STRATEGY="off")
    for operations, stored, computed, leaves in (
        ("disable_weight_init", "bfloat16", "bfloat16", True),
        (CAST, "bfloat16", "bfloat16", True),
        (CAST, "float32", "bfloat16", True),
        (CAST, FP8, "bfloat16", True),
        (CAST, FP8, "float32", True),
        (CAST, "float8_e5m2", "float16", True),
        # Multiplies in fp8 on cards that can, and casts otherwise: it is not asked which.
        ("fp8_ops", FP8, "bfloat16", False),
    ):
        found = process.call(
            "overlapped:later_columns", operations=operations, stored=stored, computed=computed
        )
        assert found == [leaves, True], (operations, stored, computed)
