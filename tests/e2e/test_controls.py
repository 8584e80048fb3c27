"""ControlNets and nodes' own code with the ranks: what crosses, and what a lost rank costs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import pytest
from rig import feature_controls, feature_packs
from rig.compare import compare_all
from rig.faults import Fault, Orders
from rig.feature_models import feature_models
from rig.feature_rows import PACKS, Row, plain
from rig.feature_run import write_inputs
from rig.graphs import Graph, set_inputs
from rig.pair import STRICT, run, run_stock
from rig.server import Server
from rig.status_schema import counted
from rig.trees import Tree

from comfy_xdit_patch.host.pace.auto import ONE_IS_FASTER
from comfy_xdit_patch.planning.verdict import ONE

Servers = Callable[..., Server]

DEADLINE_S = 600.0
STARTING = "the workers are still starting"
WIDTH, TOKENS = 512, 64  # of the models, and of an image of 128 px
RESIDUAL_BYTES = WIDTH * TOKENS * 4


def setup() -> dict[str, object]:
    packs = sorted(path for path in PACKS.iterdir() if (path / "__init__.py").exists())
    return {"models": feature_models(), "node_packs": (PACKS.with_name("gguf_pack"), *packs)}


def with_ranks(servers: Servers, tree: Tree, **env: str) -> Server:
    env = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": STRICT["XDIT_START_TIMEOUT"], **env}
    server = servers(tree, **env, **setup())
    write_inputs(server)
    return server


def bytes_per_step(server: Server, graph: Graph) -> tuple[float, dict[str, int]]:
    """Run a graph twice; the second time nothing is new but the noise."""
    run(server, graph)
    before = server.status()
    run(server, set_inputs(graph, seed=71))
    after = server.status()
    steps = after["totals"]["steps_parallel"] - before["totals"]["steps_parallel"]
    assert steps > 0, counted(after["fell_back"])
    written = after["totals"]["bytes_to_workers"] - before["totals"]["bytes_to_workers"]
    name = "controls_parallel"
    controls = {name: after["totals"][name] - before["totals"][name]}
    return written / steps, controls


@pytest.mark.newest_only
def test_no_residual_crosses(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    ranks = with_ranks(servers, tree)
    without, _ = bytes_per_step(ranks, Row(plain).graph())
    row = feature_controls.ROWS["two ControlNets, chained"]
    together, controls = bytes_per_step(ranks, row.graph())
    record_property("bytes per step", {"without": without, "two ControlNets": together})
    assert controls == {"controls_parallel": 2 * row.steps}
    assert together - without < RESIDUAL_BYTES, "a residual, or what could hide one, was sent"


def have_measured(server: Server, fastest: str) -> None:
    """Have ``auto`` know of this way as the fastest, for all that it has measured."""
    file = server.base_dir / "cache" / "comfy-xdit-patch" / "verdicts.json"
    body = json.loads(file.read_text())
    for verdict in body["verdicts"].values():
        for way, pace in verdict["paces"].items():
            pace["fastest_s"] = pace["median_s"] = 10.0 if way == fastest else 20.0
    file.write_text(json.dumps(body))
    seconds = int(server.env["XDIT_START_TIMEOUT"]) + 1
    server.have({**server.env, "XDIT_START_TIMEOUT": str(seconds)})


@pytest.mark.newest_only
def test_controlnets_are_shared_as_the_model_is_by_what_auto_measured(
    servers: Servers, tree: Tree
) -> None:
    ranks = with_ranks(servers, tree, XDIT_STRATEGY="auto")
    row = feature_controls.ROWS["two ControlNets, chained"]
    run(ranks, set_inputs(Row(plain).graph(), steps=20))  # a trial
    have_measured(ranks, "ring=2")
    without, _ = bytes_per_step(ranks, Row(plain).graph())
    together, controls = bytes_per_step(ranks, row.graph())
    assert ranks.status()["last_run"]["plan"] == "ring=2"
    assert controls == {"controls_parallel": 2 * row.steps}
    assert together - without < RESIDUAL_BYTES, "a residual was computed in ComfyUI and sent"
    have_measured(ranks, ONE)
    before = ranks.status()
    run(ranks, set_inputs(row.graph(), seed=72))  # Its ControlNets were loaded before.
    status = ranks.status()
    assert status["last_run"]["steps_chose_one_gpu"] == row.steps
    assert status["totals"]["controls_parallel"] == before["totals"]["controls_parallel"], (
        "nobody's"
    )
    assert ONE_IS_FASTER.reason in counted(status["controls_alone"])


@pytest.mark.newest_only
def test_a_controlnet_that_is_called_while_ranks_start_costs_none(
    servers: Servers, tree: Tree, orders: Orders
) -> None:
    """It comes before the first call of the model, and is the first to ask for them."""
    env = {"XDIT_GPUS": "cpu:2", "RIG_FAULTS": str(orders.path)}
    env["XDIT_START_TIMEOUT"] = STRICT["XDIT_START_TIMEOUT"]
    # The nursery has imported when new ranks are to start.
    run(servers(tree, **env, **setup()), Row(plain).graph())
    ranks = servers(tree, **env, XDIT_START="early", **setup())
    write_inputs(ranks)
    orders.give(Fault("join", "delay", 0))
    before = ranks.status()["controls_alone"]
    run(ranks, feature_controls.ROWS["InstantX"].graph())
    assert not orders.open(), "nothing was delayed"
    status = ranks.status()
    assert status["last_run"]["fall_back_reasons"].keys() == {STARTING}
    alone = {*counted(status["controls_alone"]).items()} - {*counted(before).items()}
    assert {reason for reason, _ in alone} == {STARTING}
    assert status["last_error"] is None


@pytest.mark.newest_only
@pytest.mark.parametrize(
    ("section", "name", "victim"),
    [
        (feature_controls.ROWS, "two ControlNets, chained", 0),
        (feature_packs.ROWS, "PuLID_Flux_ll (patches_replace)", 1),
    ],
    ids=["ControlNet", "around the blocks"],
)
def test_a_rank_lost_in_mid_run_costs_no_image(
    servers: Servers, tree: Tree, section: dict[str, Row], name: str, victim: int
) -> None:
    row = section[name]
    graph = set_inputs(row.graph(), steps=8, seed=80 + victim)
    stock = servers(tree, XDIT_STRATEGY="off", **setup())
    write_inputs(stock)
    expected = run_stock(stock, graph)
    ranks = with_ranks(servers, tree)
    run(ranks, row.graph())  # warm, and whole again after the case before
    end = time.monotonic() + DEADLINE_S
    while ranks.status()["state"] != "ready":
        assert time.monotonic() < end, ranks.status()
        time.sleep(0.2)
    prompt = ranks.post_prompt(graph)
    ranks.wait_for_steps(prompt, 2, DEADLINE_S)
    os.kill(ranks.status()["ranks"][victim]["pid"], signal.SIGKILL)
    history = ranks.wait(prompt, DEADLINE_S)
    difference = compare_all(expected.images, ranks.images(history))
    assert difference.is_equal, str(difference)
    last = ranks.status()["last_run"]
    assert 0 < last["steps_parallel"] < 8, last
    assert list(last["fall_back_reasons"]) == ["a worker was lost"]
