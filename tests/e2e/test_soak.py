"""Prompts in a row: models, LoRAs, sizes and Free in turn, and nothing grows.

``SOAK_PROMPTS`` says how many; two rounds of all kinds if it is not set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from rig import graphs, weight_graphs
from rig.compare import compare_all
from rig.memory import own_memory
from rig.pair import STRICT, run, run_stock
from rig.server import Server
from rig.trees import Tree
from rig.weight_rows import KOHYA

NUM_PROMPTS = int(os.environ.get("SOAK_PROMPTS", "24"))
FREE_EVERY = 6
GROWTH = 1.05

Servers = Callable[..., Server]

# (workflow, LoRAs, GGUF file, pixels): twelve, so that each comes back several times.
KINDS: tuple[tuple[str, tuple[tuple[str, float], ...], str | None, tuple[int, int]], ...] = (
    ("ksampler_dev", (), None, (128, 128)),
    ("ksampler_schnell", (), None, (128, 128)),
    ("ksampler_dev", ((KOHYA, 1.0),), None, (96, 160)),
    ("ksampler_dev", ((KOHYA, 0.4),), None, (128, 128)),
    ("ksampler_schnell", (("diffusers.safetensors", 0.8),), None, (192, 96)),
    ("ksampler_dev", (), "flux1-dev-Q8_0.gguf", (128, 128)),
    ("ksampler_dev", ((KOHYA, 0.6), ("lokr.safetensors", 0.7)), None, (128, 128)),
    ("ksampler_dev", (), None, (96, 96)),
    ("ksampler_dev", ((KOHYA, 1.0),), "flux1-dev-Q8_0.gguf", (128, 96)),
    ("ksampler_schnell", ((KOHYA, -0.5),), None, (128, 128)),
    ("ksampler_dev", (("loha.safetensors", 1.0),), None, (160, 128)),
    ("ksampler_schnell", (), None, (192, 192)),
)


def graph_of(number: int) -> graphs.Graph:
    workflow, loras, gguf, size = KINDS[number % len(KINDS)]
    graph = graphs.with_values(
        graphs.load(workflow), seed=600 + number % len(KINDS), size=size, steps=2, save_latent=True
    )
    if gguf is not None:
        graph = weight_graphs.with_gguf(graph, gguf)
    return weight_graphs.with_loras(graph, *loras) if loras else graph


@pytest.mark.slow  # two dozen images
@pytest.mark.thorough
@pytest.mark.newest_only
def test_many_prompts_leave_no_trace(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    stock = servers(tree, XDIT_STRATEGY="off")
    ranks = servers(tree, XDIT_GPUS="cpu:2", **STRICT)
    before = ranks.status()
    start = time.monotonic()
    memory: list[dict[str, Any]] = []
    for number in range(NUM_PROMPTS):
        graph = graph_of(number)
        expected = run_stock(stock, graph)
        # ComfyUI answers a prompt that it has just made from its cache: the sampler must run.
        difference = compare_all(expected.images, run(ranks, graph).images)
        assert difference.is_equal, f"prompt {number}, {KINDS[number % len(KINDS)]}: {difference}"
        if number % FREE_EVERY == FREE_EVERY - 1:
            memory.append(freed(ranks))
    status = ranks.status()
    record_property("seconds", time.monotonic() - start)
    record_property("own memory after each Free", memory)
    assert status["totals"]["steps_fell_back"] == before["totals"]["steps_fell_back"]
    assert status["totals"]["runs"] == before["totals"]["runs"] + NUM_PROMPTS, (
        "every prompt ran its sampler"
    )
    assert (
        status["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 2 * NUM_PROMPTS
    )
    first, last = memory[1], memory[-1]
    for name in first:
        assert last[name] <= GROWTH * first[name], f"{name} grew: {memory}"


def freed(server: Server) -> dict[str, int]:
    """Free, wait until ComfyUI has done it, and measure host and workers."""
    server.free_and_wait()
    pids = [rank["pid"] for rank in server.status()["ranks"]]
    assert server.process is not None
    return {
        "host": own_memory(server.process.pid),
        **{f"rank {rank}": own_memory(pid) for rank, pid in enumerate(pids)},
    }
