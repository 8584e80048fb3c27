"""What it costs to change weights: bytes put into shared memory, and the ranks' seconds to load.

The sequence of one user: base, a LoRA, another strength, another LoRA, back to base, back to the
first LoRA. What the workers have seen before is not sent again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import weight_graphs
from rig.graphs import Graph
from rig.pair import Pair, run_pair
from rig.server import Server
from rig.trees import Tree
from rig.weight_rows import KOHYA, SETUP, base_graph

DIFFUSERS = "diffusers.safetensors"
# A server with ranks of its own: "first use" means that nobody has loaded anything before.
OWN = {"XDIT_STEP_TIMEOUT": "601"}
SLACK = 1.05  # alignment of tensors in shared memory

SEQUENCE: dict[str, Graph] = {
    "first use of base": base_graph(),
    "+ LoRA": weight_graphs.with_loras(base_graph(), (KOHYA, 1.0)),
    "strength changed": weight_graphs.with_loras(base_graph(), (KOHYA, 0.5)),
    "LoRA swapped": weight_graphs.with_loras(base_graph(), (DIFFUSERS, 1.0)),
    "back to base": base_graph(),
    "back to the first LoRA": weight_graphs.with_loras(base_graph(), (KOHYA, 1.0)),
}


@pytest.mark.newest_only
def test_what_a_change_of_weights_costs(
    servers: Callable[..., Server], tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    moved: dict[str, int] = {}
    for name, graph in SEQUENCE.items():
        pair = run_pair(servers, tree, graph, 2, env=OWN, **SETUP)
        moved[name] = bytes_moved(pair)
        load_s = [rank["load_s"] for rank in pair.after["ranks"]]
        record_property(name, f"{moved[name]} bytes, seconds to load by rank: {load_s}")

    models = servers(tree, XDIT_STRATEGY="off", **SETUP).base_dir / "models"
    base = models / "diffusion_models" / "flux1-dev.safetensors"
    assert moved["first use of base"] <= SLACK * tensor_bytes(base), moved
    for name, lora in (("+ LoRA", KOHYA), ("LoRA swapped", DIFFUSERS)):
        assert 0 < moved[name] <= SLACK * tensor_bytes(models / "loras" / lora), moved
    for name in ("strength changed", "back to base", "back to the first LoRA"):
        assert moved[name] == 0, moved


def bytes_moved(pair: Pair) -> int:
    return int(pair.after["totals"]["bytes_weights"]) - int(pair.before["totals"]["bytes_weights"])


def tensor_bytes(path: Path) -> int:
    """Return the size of the tensors in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return max(int(entry["data_offsets"][1]) for entry in header.values())
