"""Graphs drawn by chance from everything that runs in parallel: each image is stock's.

``FUZZ_GRAPHS`` is the number of graphs for each ComfyUI and number of ranks (2 if it is not set, 3
with ``--all``), ``FUZZ_FIRST`` the first seed; a failure names its seed and what the graph
contains.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from rig.breadth import how_many
from rig.environment import RigError
from rig.feature_models import feature_models
from rig.feature_rows import PARALLEL
from rig.feature_run import COMMON_PACKS, Found, found, write_inputs
from rig.pair import STRICT, run, run_stock
from rig.random_graphs import Drawn, draw
from rig.server import Server
from rig.trees import Tree

Servers = Callable[..., Server]
Record = Callable[[str, object], None]

NUM_GRAPHS = how_many(2, whole=3, variable="FUZZ_GRAPHS")
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
SETUP = {"node_packs": COMMON_PACKS}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_random_graphs_equal_stock(
    servers: Servers, tree: Tree, num_ranks: int, record_property: Record
) -> None:
    setup = {**SETUP, "models": feature_models()}
    # Other seeds on three ranks: other graphs are worth more than the same ones again.
    first = FIRST + (0 if num_ranks == 2 else 100_000)
    failures, worst = [], 0
    for seed in range(first, first + NUM_GRAPHS):
        drawn = draw(seed)
        stock = servers(tree, XDIT_STRATEGY="off", **setup)
        ranks = servers(tree, XDIT_GPUS=f"cpu:{num_ranks}", **STRICT, **setup)
        try:
            result = run_drawn(stock, ranks, drawn)
            assert result.outcome == PARALLEL, f"{result}: {result.reasons}"
            worst = max(worst, result.max_pixel or 0)
        except (AssertionError, RigError) as error:
            failures.append(f"{drawn}\n    {' | '.join(str(error).strip().splitlines()[-3:])}")
    record_property("graphs", NUM_GRAPHS)
    record_property("worst", f"{worst}/255")
    if failures:
        text = "\n".join(failures)
        pytest.fail(f"{len(failures)} of {NUM_GRAPHS} graphs failed:\n{text}", pytrace=False)


def run_drawn(stock: Server, ranks: Server, drawn: Drawn) -> Found:
    for server in (stock, ranks):
        write_inputs(server)
    reference = run_stock(stock, drawn.graph)
    before = ranks.status()
    result = run(ranks, drawn.graph)
    return found(reference, result, before, ranks.status())
