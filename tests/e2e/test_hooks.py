"""A LoRA scheduled by a hook is refused, and ComfyUI makes the image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig import graphs
from rig.compare import compare_all
from rig.server import Server
from rig.trees import Tree
from rig.weight_rows import KOHYA

pytestmark = pytest.mark.group("not strict")

DEADLINE_S = 600.0
STEPS = 2
REASON = "the model has hook-scheduled weight patches"

Servers = Callable[..., Server]


def plain(seed: int) -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=seed, size=(128, 128), steps=STEPS)


def hooked(seed: int) -> graphs.Graph:
    """The LoRA is on the positive conditioning alone."""
    graph = plain(seed)
    graph["hook"] = {
        "class_type": "CreateHookLoraModelOnly",
        "inputs": {"lora_name": KOHYA, "strength_model": 1.0},
    }
    graph["hooked"] = {
        "class_type": "ConditioningSetProperties",
        "inputs": {
            "cond_NEW": ["6", 0],
            "hooks": ["hook", 0],
            "strength": 1.0,
            "set_cond_area": "default",
        },
    }
    graph["8"]["inputs"]["positive"] = ["hooked", 0]
    return graph


def test_hook_scheduled_lora_is_refused_and_equal_to_stock(servers: Servers, tree: Tree) -> None:
    stock = servers(tree, XDIT_STRATEGY="off")
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="400")
    expected = stock.images(stock.run(hooked(seed=500), DEADLINE_S))
    without = stock.images(stock.run(plain(seed=500), DEADLINE_S))
    assert not compare_all(expected, without).is_equal, "the hook's LoRA changed nothing"

    difference = compare_all(expected, ranks.images(ranks.run(hooked(seed=500), DEADLINE_S)))
    assert difference.is_equal, str(difference)
    run = ranks.status()["last_run"]
    assert run["steps_parallel"] == 0
    assert run["fall_back_reasons"] == {REASON: STEPS}

    # Its weights are out of the model again: the same prompt without the hook is parallel.
    difference = compare_all(without, ranks.images(ranks.run(plain(seed=500), DEADLINE_S)))
    assert difference.is_equal, str(difference)
    run = ranks.status()["last_run"]
    assert run["steps_parallel"] == run["steps"] == STEPS
