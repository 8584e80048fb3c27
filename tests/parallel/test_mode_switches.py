"""One model goes from each way to hold its weights to each other, with and without weight patches.

Weights are whole on every rank, cut by heads and columns, in stages, sharded, or whole but for what
modulates the blocks; the ranks stay.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations
from pathlib import Path

import pytest
from exactness import BOUND, STRICT
from inside.client import Inside
from rig.breadth import is_whole
from rig.trees import Tree
from test_pipefusion import Runs
from test_strategies import ODD, following

WHOLE, CUT, STAGED, SHARDED, SHARED = STRATEGIES = (
    *("ulysses", "tensor", "pipefusion", "ulysses=3,fsdp=3", "ulysses=3,modulation=3"),
)
EVERY_SWITCH = (
    *(WHOLE, CUT, WHOLE, STAGED, WHOLE, SHARDED, CUT),
    *(STAGED, CUT, SHARDED, STAGED, SHARDED, WHOLE),
    *(SHARED, CUT, SHARED, STAGED, SHARED, SHARDED, SHARED, WHOLE),
)
WAY = EVERY_SWITCH if is_whole() else (WHOLE, CUT, STAGED, SHARED, SHARDED, WHOLE)


@pytest.mark.group("3")
@pytest.mark.newest_only
def test_a_model_is_right_in_each_mode_whichever_it_was_in_before(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    assert {*pairwise(EVERY_SWITCH)} == {*permutations(STRATEGIES, 2)}
    stock = inside(tree, XDIT_STRATEGY="off")
    runs = Runs(stock, inside(tree, XDIT_GPUS="cpu:3", **STRICT), tmp_path)
    path = flux_dev(hidden=512, double=2, single=2)
    held: dict[str, list[int]] = {}
    worst = 0.0
    for before, strategy in pairwise(("auto", *WAY)):
        with following(runs.ranks, strategy):
            for has_lora in (False, True):
                errors, _, status = runs.run(path, [{}], **ODD, lora=has_lora)
                worst = max(worst, *errors)
                assert worst <= BOUND, (before, strategy, has_lora)
            sizes = [rank["weight_bytes"] for rank in status["ranks"]]
            assert held.setdefault(strategy, sizes) == sizes, (before, strategy)
    record_property("largest error, bytes held", (worst, held))
    assert all(max(held[mode]) < 0.9 * min(held[WHOLE]) for mode in (CUT, STAGED, SHARDED, SHARED))
