"""Node packs themselves, where ``NODE_PACKS_PATH`` names a directory with checkouts of them.

    NODE_PACKS_PATH=DIRECTORY python install.py test -n 0 tests/e2e/test_real_packs.py

prints a table of what became of each pack's steps. A pack that does not load or fails in stock
ComfyUI as it does here (a package, a file or a GPU that it wants) is a row of the table, and no
failure; an image that is not stock's is one, and so is an error that stock does not have.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig.environment import RigError
from rig.feature_graphs import Draft
from rig.feature_models import feature_models
from rig.feature_run import Found, found, write_inputs
from rig.graphs import Graph
from rig.pair import STRICT, Result, run
from rig.real_packs import PACKS, PATH, Nodes, RealPack
from rig.server import Server
from rig.trees import Tree

HERE = [pack for pack in PACKS if pack.checkouts()]
STEPS = 4
SETTINGS = {name: value for name, value in STRICT.items() if name != "XDIT_STRICT"}


@pytest.mark.skipif(not HERE, reason=f"{PATH} names no directory with checkouts of node packs")
def test_real_packs(
    servers: Callable[..., Server], tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, failures = [], []
    for pack in PACKS:
        try:
            text = row(servers, tree, pack) if pack.checkouts() else "no checkout"
        except (AssertionError, RigError) as error:
            text = f"FAILED: {str(error).splitlines()[0][:200]}"
            failures.append(f"{pack.repository}: {text}")
        lines.append(f"{pack.repository:30} {text}")
    with capsys.disabled():
        print(f"\nReal node packs on ComfyUI {tree.version}, 2 CPU ranks:", *lines, sep="\n  ")  # noqa: T201
    assert failures == []


def row(servers: Callable[..., Server], tree: Tree, pack: RealPack) -> str:
    """Run a pack's graph on stock and on ranks, and say what became of it."""
    setup = {"models": feature_models(), "node_packs": pack.checkouts()}
    stock = servers(tree, XDIT_STRATEGY="off", **setup)
    ranks = servers(tree, XDIT_GPUS="cpu:2", **SETTINGS, **setup)
    for server in (stock, ranks):
        write_inputs(server)
    nodes = Nodes(stock, Draft(steps=STEPS))
    try:
        pack.change(nodes)
    except LookupError as error:
        return f"not run: {error}"
    graph = nodes.draft.finished()
    reference = result_or_error(stock, graph)
    before = ranks.status()
    result = result_or_error(ranks, graph)
    if isinstance(reference, str) or isinstance(result, str):
        assert isinstance(reference, str), f"stock ComfyUI runs it, and ours says: {result}"
        assert isinstance(result, str), f"stock ComfyUI does not run it: {reference}"
        return f"fails in stock ComfyUI too: {reference}"
    return told(found(reference, result, before, ranks.status()))


def result_or_error(server: Server, graph: Graph) -> Result | str:
    try:
        return run(server, graph)
    except RigError as error:
        return str(error).splitlines()[0][:160]


def told(what: Found) -> str:
    reasons = "; ".join((*what.gather_reasons, *what.reasons))
    return (
        f"{what.steps_parallel} parallel, {what.steps_gathered} of them gathered, "
        f"{what.steps_skipped} without blocks, {what.steps_fell_back} fell back; "
        f"max {what.max_pixel}/255, {what.psnr_db:.1f} dB{f'; {reasons}' if reasons else ''}"
    )
