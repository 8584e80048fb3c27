"""Third-party FLUX workflows: ComfyUI's own templates, unmodified, on stock ComfyUI and on ranks.

The templates are read from the package index and converted when the test runs; only sizes and
steps are made small (``rig.corpus``). Ranks run in strict mode, in which a step that falls back is
an error, except for the graphs of ``FALLS_BACK``, whose reason is part of the table.

``RIG_CORPUS=all`` runs every graph on every ComfyUI with 2 and with 3 ranks. Without it the newest
ComfyUI runs all but the largest on 2 ranks, and a selection runs on 3, or on older ones on 2.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from rig import corpus, templates
from rig.breadth import is_whole
from rig.compare import compare_all
from rig.corpus_models import corpus_models_directory
from rig.environment import RigError
from rig.graphs import Graph
from rig.outputs import Pixels
from rig.pair import DEADLINE_S, FLAT, STRICT
from rig.server import Server
from rig.status_schema import counted
from rig.trees import Tree, trees_for_tests

Servers = Callable[..., Server]
Record = Callable[[str, object], None]

# A graph whose FLUX steps run as in ComfyUI alone, and the reason that the log gives for it.
FALLS_BACK: dict[str, str] = {}
# One graph for each way in which a graph can be special.
SELECTION = (
    "flux_schnell",
    "flux1_krea_dev",
    "flux_fill_inpaint_example",
    "image_flux.1_fill_dev_OneReward",
    "flux_redux_model_example",
    "flux1_dev_uso_reference_image_gen, all on",
    "image_chroma_text_to_image",
    "image_chroma1_radiance_text_to_image",
    "image_flux2_fp8",
    "image_flux2_klein_9b_kv_image_edit",
)
# These are like another one of the selection, in other files.
ALIKE = ("flux1_krea_dev", "image_flux.1_fill_dev_OneReward", "image_flux2_fp8")
EVERYTHING = os.environ.get("RIG_CORPUS") == "all"
ALL_NAMES = tuple(
    dict.fromkeys(name for version in corpus.NAMES for name in corpus.graph_names(version))
)

COMPLAINTS = ("unet missing", "unet unexpected", "clip unexpected")

_outcomes: dict[tuple[str, int], dict[str, str]] = {}
_graphs: dict[str, dict[str, Graph]] = {}
_stock: dict[tuple[str, str], list[Pixels]] = {}


def is_selected(tree: Tree, num_ranks: int, name: str) -> bool:
    """Return whether a test runs where not everything does."""
    if EVERYTHING:
        return True
    if not is_whole():
        return name in SELECTION and name not in ALIKE
    is_newest = tree == trees_for_tests()[-1]
    if is_newest and num_ranks == 2:
        return name not in corpus.LARGE
    if num_ranks > 2:
        return is_newest and name in SELECTION[-4:]
    return name in SELECTION


def test_the_table_names_every_template_of_the_family(tree: Tree) -> None:
    found = corpus.family_templates(templates.workflows(known_version(tree)))
    assert found - set(corpus.LEFT_OUT) == set(corpus.NAMES[tree.version])


@pytest.mark.parametrize("name", ALL_NAMES)
# The outer loop: one start of each server.
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_template_equals_stock(
    servers: Servers, tree: Tree, num_ranks: int, name: str, record_property: Record
) -> None:
    if name not in corpus.graph_names(known_version(tree)):
        pytest.skip(f"ComfyUI {tree.version} has no such template")
    if not is_selected(tree, num_ranks, name):
        pytest.skip("RIG_CORPUS=all runs it; --all runs nearly all on the newest ComfyUI")
    expected = reason_to_fall_back(tree, name)
    models = corpus_models_directory()
    stock_server = servers(tree, XDIT_STRATEGY="off", models=models, node_packs=())
    graph = small_graph(stock_server, tree, name)
    reference = stock_images(stock_server, tree, name, graph)
    outcomes = _outcomes.setdefault((tree.version, num_ranks), {})
    outcomes[name] = "failed"
    settings = {"XDIT_GPUS": f"cpu:{num_ranks}", **STRICT}
    if expected is not None:
        settings["XDIT_STRICT"] = "0"
    server = servers(tree, models=models, node_packs=(), **settings)
    before = server.status()
    started = time.monotonic()
    try:
        images = run(server, graph)
    except RigError as error:  # the node and the reason; the rest is ComfyUI's traceback
        pytest.fail(str(error).splitlines()[0], pytrace=False)
    seconds = time.monotonic() - started
    counts = counts_between(before, server.status())
    difference = compare_all(reference, images)
    record_property("corpus", f"{difference}; {seconds:.1f} s; {counts}")
    assert difference.is_equal, f"the image is not stock's: {difference}"
    if expected is None:
        assert not counts["fall_back_reasons"], counts
        assert counts["steps_parallel"] > 0, f"no step ran in parallel: {counts}"
        assert all(forwards > 0 for forwards in counts["forwards"]), counts
    else:
        reasons = "; ".join(counts["fall_back_reasons"])
        assert re.search(expected, reasons), f"not the reason in the table: {counts}"
    outcomes[name] = "; ".join(counts["fall_back_reasons"]) or "parallel"


@pytest.mark.group("last")
def test_nothing_of_the_corpus_was_passed_over(tree: Tree, record_property: Record) -> None:
    """Count what the tests above found; without them there is nothing to count."""
    ran = {ranks: found for (version, ranks), found in _outcomes.items() if version == tree.version}
    if not ran:
        pytest.skip("no graph of the corpus ran in this session")
    for num_ranks, outcomes in ran.items():
        parallel = [name for name, outcome in outcomes.items() if outcome == "parallel"]
        others = {name: outcome for name, outcome in outcomes.items() if name not in parallel}
        summary = f"{len(outcomes)} graphs, {len(parallel)} parallel, {len(others)} not: {others}"
        record_property(f"{num_ranks} ranks", summary)
        assert all(reason_to_fall_back(tree, name) for name in others), summary
    if EVERYTHING:
        for num_ranks, outcomes in ran.items():
            assert set(outcomes) == set(corpus.graph_names(tree.version)), f"{num_ranks} ranks"


def known_version(tree: Tree) -> str:
    """Return the tree's version; skip where its template package is not known."""
    if tree.version not in templates.PACKAGES:
        pytest.skip(f"which template package belongs to ComfyUI {tree.version} is not known here")
    return tree.version


def reason_to_fall_back(tree: Tree, name: str) -> str | None:
    """Return the pattern of the reason why a graph is not parallel, if it is not."""
    return FALLS_BACK.get(f"{name} on {tree.version}", FALLS_BACK.get(name))


def small_graph(server: Server, tree: Tree, name: str) -> Graph:
    """Return a template of this version, converted and shrunk."""
    if tree.version not in _graphs:
        found = corpus.corpus_workflows(tree.version, templates.workflows(tree.version))
        _graphs[tree.version] = templates.convert(server, found)
    return corpus.shrink(name, _graphs[tree.version][name])


def stock_images(server: Server, tree: Tree, name: str, graph: Graph) -> list[Pixels]:
    """Return what stock ComfyUI makes of a graph; every sampled picture must show something."""
    key = tree.version, name
    if key not in _stock:
        already_logged = len(server.log_text())
        images = run(server, graph)
        log = server.log_text()[already_logged:]
        complaints = [line for line in log.splitlines() if any(c in line for c in COMPLAINTS)]
        assert not complaints, f"a file does not fit its model: {complaints[0]}"
        flattest = min(float(image.std()) for image in images)
        assert flattest > FLAT, f"a flat image proves nothing: standard deviation {flattest:.1f}"
        _stock[key] = images
    return _stock[key]


def run(server: Server, graph: Graph) -> list[Pixels]:
    """Run a graph; return every picture that something sampled has gone into."""
    corpus.write_pictures(graph, server.base_dir / "input")
    history = server.run(graph, DEADLINE_S)
    sampled = corpus.sampled_outputs(graph)
    outputs = {node: made for node, made in history["outputs"].items() if node in sampled}
    if not outputs:
        raise RigError(f"no output of a sampler among {sorted(history['outputs'])}.")
    return server.images({**history, "outputs": outputs})


def counts_between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what the status counted between two readings."""
    old_reasons = counted(before["fell_back"])
    return {
        "steps_parallel": after["totals"]["steps_parallel"] - before["totals"]["steps_parallel"],
        "fall_back_reasons": {
            reason: count - old_reasons.get(reason, 0)
            for reason, count in counted(after["fell_back"]).items()
            if count > old_reasons.get(reason, 0)
        },
        "forwards": [
            new["forwards"] - old["forwards"]
            for old, new in zip(before["ranks"], after["ranks"], strict=True)
        ],
    }
