"""Graphs that have the model compiled: the image is stock's, ranks run its blocks compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from rig import feature_packs, feature_sampling
from rig.feature_models import SIZES, feature_models
from rig.feature_rows import PARALLEL
from rig.feature_run import COMMON_PACKS, run_row
from rig.pair import DEADLINE_S, STRICT
from rig.server import Server
from rig.trees import Tree

Servers = Callable[..., Server]

ALL = SIZES.double + SIZES.single
# Rows of the feature table, and how many blocks they have compiled.
ROWS = {
    "KJNodes, compiled blocks": (feature_packs.ROWS, 2),
    "TeaCache and WaveSpeed, compiled model": (feature_packs.ROWS, ALL),
    "TorchCompileModel": (feature_sampling.ROWS, ALL),
}
BY_INDUCTOR = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for inductor"),
    pytest.mark.thorough,  # in ComfyUI too, which takes minutes
]


@pytest.mark.newest_only
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=BY_INDUCTOR * (name == "TorchCompileModel")) for name in ROWS],
)
def test_the_next_prompt_compiles_nothing(servers: Servers, tree: Tree, name: str) -> None:
    rows, num_blocks = ROWS[name]
    setup = {"models": feature_models(), "node_packs": COMMON_PACKS}
    stock = servers(tree, XDIT_STRATEGY="off", **setup)
    ranks = servers(tree, XDIT_GPUS="cpu:2", **STRICT, **setup)
    already_logged = len(ranks.log_text())
    assert run_row(stock, ranks, rows[name]).outcome == PARALLEL
    first = ranks.status()["ranks"]
    assert [rank["blocks_compiled"] for rank in first] == [num_blocks] * 2
    graph = rows[name].graph()
    next(n for n in graph.values() if n["class_type"] == "KSampler")["inputs"]["seed"] += 1
    ranks.run(graph, DEADLINE_S)
    second = ranks.status()["ranks"]
    assert [rank["blocks_compiled"] for rank in second] == [num_blocks] * 2
    assert [rank["graphs"] for rank in second] == [rank["graphs"] for rank in first]
    assert "run as they are" not in ranks.log_text()[already_logged:]
