"""Steps as one CUDA graph on emulated cards: images are, bit for bit, those without graphs.

A replay of an emulated graph runs no Python, and computes on the memory that was captured
(``rig/emulated_gpu/emulated_graphs.py``): whatever is not copied there is that of an earlier step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rig.feature_models import feature_models
from rig.feature_run import COMMON_PACKS, write_inputs
from rig.feature_table import FEATURES
from rig.graphs import Graph, with_seed, with_values
from rig.pair import STRICT, run
from rig.server import Server
from rig.trees import Tree
from rig.weight_graphs import with_loras, with_unet
from rig.weight_rows import KOHYA, base_graph

Servers = Callable[..., Server]

pytestmark = [
    pytest.mark.newest_only,
    pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled"),
]
AROUND = ("--fp32-vae", "--fp32-text-enc")
STEPS = 3
EAGER = 2
"""Steps of a kind of call before it is replayed: one warms up, one is captured and compared."""
SETTING = "XDIT_CUDA_GRAPHS"
REPLAYED = STEPS - EAGER


def ranks_of(servers: Servers, tree: Tree, num_ranks: int = 2, **setup: Any) -> Server:
    cards = ",".join(["4090"] * num_ranks)
    numbers = ",".join(map(str, range(num_ranks)))
    env = {"XDIT_GPUS": numbers, "XDIT_STRATEGY": "ulysses", "EMULATED_CARDS": cards, **STRICT}
    env |= {SETTING: "on"}
    common = {"hidden": 256, "extra_args": AROUND, "node_packs": (), **env, **setup}
    return servers(tree, device="emulated", **common)


def replays(server: Server) -> list[int]:
    return [rank["replays"] for rank in server.status()["ranks"]]


def with_steps(graph: Graph) -> Graph:
    return with_values(graph, steps=STEPS)


def computed_anew(graph: Graph) -> Graph:
    """The same in other words, since ComfyUI keeps results: above 0.9999 it denoises wholly."""
    changed = copy.deepcopy(graph)
    sampler = next(node for node in changed.values() if "denoise" in node["inputs"])
    assert sampler["inputs"]["denoise"] == 1.0
    sampler["inputs"]["denoise"] = 0.99995
    return changed


def check(server: Server, graph: Graph, *, num_replayed: int) -> str:
    """Run a graph by replays and without; return what the log says of the run with them."""
    before, logged = replays(server), len(server.log_text())
    got = run(server, graph)
    log = server.log_text()[logged:]
    assert [now - then for now, then in zip(replays(server), before, strict=True)] == [
        num_replayed
    ] * len(before)
    server.request("/xdit/settings", {SETTING: "off"})
    expected = run(server, computed_anew(graph))
    server.request("/xdit/settings", {SETTING: "on"})
    assert server.status()["last_run"]["steps_parallel"] == STEPS
    for mine, others in ((got.latents, expected.latents), (got.images, expected.images)):
        assert mine
        assert all(map(np.array_equal, mine, others)), "bits differ"
    return log


def test_steps_are_replayed_until_weights_change_and_over_prompts(
    servers: Servers, tree: Tree
) -> None:
    server = ranks_of(servers, tree)
    graph = with_steps(base_graph())
    with_lora = with_loras(graph, (KOHYA, 1.0))
    run(server, graph)
    assert replays(server) == [REPLAYED] * 2
    run(server, with_seed(graph))
    assert replays(server) == [REPLAYED + STEPS] * 2, "a prompt captures nothing anew"
    assert "without a CUDA graph" not in check(server, with_lora, num_replayed=REPLAYED)


@pytest.mark.thorough  # two ranks of the unit tests have a smaller twin
@pytest.mark.slow
def test_where_one_rank_cannot_capture_none_does(servers: Servers, tree: Tree) -> None:
    server = ranks_of(servers, tree, EMULATED_NO_CAPTURE="1")
    logged = check(server, with_steps(base_graph()), num_replayed=0)
    says = "steps run without a CUDA graph: torch did not capture the forward: RuntimeError: CUDA"
    assert logged.count(says) == 1


@pytest.mark.thorough
@pytest.mark.slow  # images on emulated cards, each twice
def test_every_kind_of_call_has_the_bits_that_it_has_without(servers: Servers, tree: Tree) -> None:
    plain = with_steps(base_graph())
    server = ranks_of(servers, tree, models=feature_models(), node_packs=COMMON_PACKS)
    write_inputs(server)
    run(server, with_seed(with_loras(plain, (KOHYA, 1.0))))
    check(server, plain, num_replayed=REPLAYED)
    check(server, with_values(plain, size=(160, 128)), num_replayed=REPLAYED)
    check(server, with_values(plain, batch_size=2), num_replayed=REPLAYED)
    check(server, with_values(plain, cfg=3.0), num_replayed=REPLAYED)
    check(server, with_steps(FEATURES["FLUX.1 Kontext"].graph()), num_replayed=REPLAYED)
    check(server, with_steps(FEATURES["InstantX"].graph()), num_replayed=REPLAYED)
    logged = check(server, with_steps(FEATURES["unknown attn1_patch"].graph()), num_replayed=0)
    assert "steps run without a CUDA graph: a node's patch takes part in the call" in logged


@pytest.mark.thorough
@pytest.mark.slow  # images on emulated cards, each twice
def test_graphs_read_weights_that_were_cast_once(servers: Servers, tree: Tree) -> None:
    server = ranks_of(servers, tree, XDIT_STRATEGY="ulysses=2,modulation=2")
    fp8 = with_unet(base_graph(), "flux1-dev.safetensors", weight_dtype="fp8_e4m3fn")
    for graph in (fp8, with_loras(fp8, (KOHYA, 1.0)), with_seed(fp8)):
        check(server, with_steps(graph), num_replayed=REPLAYED)
        assert server.status()["residency"][0].startswith("weights cast once")


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "tensor", "batch=2,ulysses=2", "modulation"])
def test_every_plan_can_be_a_graph(servers: Servers, tree: Tree, strategy: str) -> None:
    num_ranks = 4 if "batch" in strategy else 2
    name = "ulysses=2,modulation=2" if strategy == "modulation" else strategy
    server = ranks_of(servers, tree, num_ranks, XDIT_STRATEGY=name)
    check(server, with_values(with_steps(base_graph()), cfg=3.0), num_replayed=REPLAYED)
