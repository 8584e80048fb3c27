"""Two diffusion models in turn, in every step: each with its own weights, and no second load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from rig import graphs
from rig.compare import compare_all
from rig.server import Server
from rig.trees import Tree

DEADLINE_S = 600.0
STRICT = {"XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
SCHNELL = "flux1-schnell.safetensors"

Servers = Callable[..., Server]


def run_pair(servers: Servers, tree: Tree, graph: graphs.Graph) -> dict[str, Any]:
    """Compare a graph's images on both servers; return the status of the one with ranks."""
    stock = servers(tree, XDIT_STRATEGY="off")
    ranks = servers(tree, XDIT_GPUS="cpu:2", **STRICT)
    expected = stock.images(stock.run(graph, DEADLINE_S))
    difference = compare_all(expected, ranks.images(ranks.run(graph, DEADLINE_S)))
    assert difference.is_equal, str(difference)
    assert min(image.std() for image in expected) > 5, "a flat image proves nothing"
    status = ranks.status()
    run = status["last_run"]
    assert run["steps_fell_back"] == 0
    assert run["steps_parallel"] == run["steps"] > 0
    return status


def two_models(seed: int) -> graphs.Graph:
    """Dev for the positive pass and schnell for the negative pass of every step."""
    graph = graphs.with_values(
        graphs.load("sampler_custom_advanced_dev"), seed=seed, size=(128, 128), steps=2
    )
    second = copy.deepcopy(graph["1"])
    second["inputs"]["unet_name"] = SCHNELL
    graph["1-negative"] = second
    graph["12"] = {
        "class_type": "DualModelGuider",
        "inputs": {
            "model": ["15", 0],
            "model_negative": ["1-negative", 0],
            "positive": ["6", 0],
            "negative": ["4", 0],
            "cfg": 3.0,
        },
    }
    return graph


@pytest.mark.newest_only
@pytest.mark.needs("comfy_extras/nodes_custom_sampler.py", "class DualModelGuider")
def test_two_models_in_one_step_equal_stock_and_stay_loaded(servers: Servers, tree: Tree) -> None:
    first = run_pair(servers, tree, two_models(seed=410))
    assert first["last_run"]["steps"] >= 4, "two models, two steps"
    second = run_pair(servers, tree, two_models(seed=411))
    assert second["totals"]["loads"] == first["totals"]["loads"], (
        "a model that ComfyUI keeps was loaded again"
    )
