"""Workers that start meanwhile: no image waits for them that ComfyUI can begin alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare_all
from rig.faults import Fault, Orders, children
from rig.judgement import wrong_of
from rig.server import Server, base_directory
from rig.trees import Tree

pytestmark = pytest.mark.newest_only

DEADLINE_S = 300.0
LONG_S = 6.0
"""Three times as long as the start of a rank is delayed."""
ALONE = "the workers are still starting"


def graph_of(seed: int, steps: int) -> graphs.Graph:
    return graphs.with_values(
        graphs.load("ksampler_dev"), seed=seed, size=(192, 192), steps=steps, save_latent=True
    )


def step_s(server: Server) -> float:
    """Seconds of a step. ComfyUI leaves out reports of steps that follow each other too soon."""

    def prompt_s(steps: int) -> float:
        begin = time.monotonic()
        server.run(graph_of(seed=899, steps=steps), DEADLINE_S)
        return time.monotonic() - begin

    prompt_s(1)  # loads
    few_s, many_s = prompt_s(5), prompt_s(45)
    return (many_s - few_s) / 40


@pytest.mark.parametrize("strategy", ["ulysses", "pipefusion"])
def test_comfyui_computes_alone_until_the_workers_are_ready_then_all_do(
    servers: Callable[..., Server], tree: Tree, orders: Orders, strategy: str
) -> None:
    stock = servers(tree, XDIT_STRATEGY="off")
    num_steps = max(20, round(LONG_S / step_s(stock)))
    graph = graph_of(seed=900, steps=num_steps)
    expected = stock.images(stock.run(graph, DEADLINE_S))
    env = {
        "XDIT_GPUS": "cpu:2",
        "XDIT_STRATEGY": strategy,
        "XDIT_START_TIMEOUT": "180",
        "XDIT_STEP_TIMEOUT": "60",
        "RIG_FAULTS": str(orders.path),
    }
    # The nursery has imported when new ranks are to start.
    servers(tree, **env).run(graph_of(seed=899, steps=1), DEADLINE_S)
    ranks = servers(tree, **env, XDIT_START="early")
    orders.give(Fault("join", "delay", 0))
    num_texts = len(ranks.texts)
    prompt = ranks.post_prompt(graph)
    ranks.wait_for_steps(prompt, 1, DEADLINE_S)
    start = ranks.status()["start"]
    assert (start["stage"], start["seconds"] > 0) == ("starting", True)
    assert wrong_of(ranks, "state: starting", "starting since ") == []
    history = ranks.wait(prompt, DEADLINE_S)
    run = ranks.status()["last_run"]
    assert not orders.open(), "nothing was delayed"
    assert run["fall_back_reasons"].keys() == {ALONE}
    assert 0 < run["steps_parallel"] < run["steps"] == num_steps, run
    assert run["is_exact"] == (strategy != "pipefusion")
    difference = compare_all(expected, ranks.images(history))
    assert difference.is_equal or strategy == "pipefusion", str(difference)
    sampler = next(n for n, node in graph.items() if node["class_type"].startswith("KSampler"))
    said = (sampler, "xDiT: starting 2 CPU ranks, ComfyUI computes alone meanwhile")
    # The page does not go on to say that they start.
    assert ranks.texts[num_texts:][-2:] == [said, (sampler, "xDiT: 2 CPU ranks are ready")]
    assert "xDiT: starting 2 CPU ranks..." in ranks.log_text()
    # What follows is parallel from its first step on.
    ranks.run(graph_of(seed=901, steps=6), DEADLINE_S)
    assert ranks.status()["last_run"]["steps_parallel"] == 6


@pytest.mark.parametrize("start", ["early", "first"])
def test_imports_begin_when_the_server_runs_unless_they_are_to_wait(
    tree: Tree, tmp_path: Path, start: str
) -> None:
    env = {"XDIT_GPUS": "cpu:2", "XDIT_START": start}
    models = models_directory(Sizes(hidden=256))
    with base_directory(tmp_path, models) as base, Server(tree, base, env=env) as server:
        assert server.process is not None
        end = time.monotonic() + (DEADLINE_S if start == "early" else 2.0)
        names: list[str] = []
        while not names and time.monotonic() < end:
            pids = children(server.process.pid)
            names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
            time.sleep(0.1)
        assert server.status()["state"] == "idle"
    assert len(names) == (start == "early")
