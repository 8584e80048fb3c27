"""A LoRA that a hook lays over the weights for some calls: parallel, in strict mode, and equal.

Strict mode compares the weights in use bit for bit, in each state that a run asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import weight_graphs
from rig.compare import compare_all
from rig.graphs import Graph
from rig.pair import STRICT, Pair, run, run_pair
from rig.server import Server
from rig.trees import Tree
from rig.weight_rows import KOHYA, ROWS, SETUP, base_graph

STEPS, RANKS = 3, 2
BOTH, POSITIVE = ("positive", "negative"), ("positive",)
# A server with ranks of its own: nobody has sent the LoRA before.
OWN = {"XDIT_STEP_TIMEOUT": "602"}
SLACK = 1.05  # alignment of tensors in shared memory
SEVERAL_GROUPS = "several groups of hooks patch quantised weights"

Servers = Callable[..., Server]


def graph_of(row: str = "plain", *, on: tuple[str, ...] = POSITIVE, strength: float = 1.0) -> Graph:
    """Return a row's graph, with cfg 3 so that both prompts are computed in every step."""
    graph = ROWS[row].graph(base_graph())
    graph["8"]["inputs"].update(cfg=3.0, steps=STEPS)
    return weight_graphs.with_hooked_lora(graph, KOHYA, on=on, strength=strength)


def bytes_sent(pair: Pair) -> int:
    return int(pair.after["totals"]["bytes_weights"]) - int(pair.before["totals"]["bytes_weights"])


def verified(pair: Pair) -> int:
    return int(pair.after["totals"]["weights_verified"]) - int(
        pair.before["totals"]["weights_verified"]
    )


def test_a_hooks_lora_is_parallel_and_crosses_once(servers: Servers, tree: Tree) -> None:
    plain = run_pair(servers, tree, graph_of(on=()), RANKS, env=OWN, **SETUP)
    hooked = run_pair(servers, tree, graph_of(), RANKS, env=OWN, **SETUP)
    assert not compare_all(plain.stock.images, hooked.stock.images).is_equal, "the LoRA is not seen"
    lora = servers(tree, XDIT_STRATEGY="off", **SETUP).base_dir / "models" / "loras" / KOHYA
    # The weights change twice in every step.
    assert 0 < bytes_sent(hooked) <= SLACK * tensor_bytes(lora)
    # Both of the run's states were compared on every rank, each once.
    assert verified(hooked) == 2 * verified(plain) > 0

    weaker = run_pair(servers, tree, graph_of(strength=0.5), RANKS, env=OWN, **SETUP)
    again = run_pair(servers, tree, graph_of(), RANKS, env=OWN, **SETUP)
    after = run_pair(servers, tree, graph_of(on=()), RANKS, env=OWN, **SETUP)
    assert [bytes_sent(pair) for pair in (weaker, again, after)] == [0, 0, 0]


@pytest.mark.parametrize(
    "row",
    [
        "fp8_e4m3fn",
        pytest.param("checkpoint, bf16", marks=pytest.mark.thorough),
        pytest.param("merge 0.5 + LoRA", marks=pytest.mark.thorough),
    ],
)
def test_weights_that_are_rounded_are_the_same_bits(servers: Servers, tree: Tree, row: str) -> None:
    pair = run_pair(servers, tree, graph_of(row), RANKS, env=OWN, **SETUP)
    assert verified(pair) > 0


def test_one_group_of_hooks_on_quantised_weights(servers: Servers, tree: Tree) -> None:
    row = "scaled fp8"
    stock = servers(tree, XDIT_STRATEGY="off", **SETUP)
    if not knows_scaled_fp8(tree):
        with pytest.raises(Exception, match="has no attribute 'weight_scale'"):
            run(stock, graph_of(row, on=BOTH))
        pytest.skip("this ComfyUI's own hooks fail on quantised weights")
    run_pair(servers, tree, graph_of(row, on=BOTH), RANKS, env=OWN, **SETUP)
    # The same weights once more: ComfyUI computes them anew in every run.
    run_pair(servers, tree, graph_of(row, on=()), RANKS, env=OWN, **SETUP)
    run_pair(servers, tree, graph_of(row, on=BOTH), RANKS, env=OWN, **SETUP)

    with pytest.raises(Exception, match=SEVERAL_GROUPS):
        run(servers(tree, XDIT_GPUS=f"cpu:{RANKS}", **STRICT, **OWN, **SETUP), graph_of(row))


def knows_scaled_fp8(tree: Tree) -> bool:
    return "def scaled_fp8_ops" in (tree.path / "comfy" / "ops.py").read_text()


def tensor_bytes(path: Path) -> int:
    """Return the size of the tensors in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return max(int(entry["data_offsets"][1]) for entry in header.values())
