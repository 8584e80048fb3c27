"""ComfyUI as on NVIDIA cards, with dynamic VRAM: all steps are parallel and equal to stock.

Two emulated cards (``rig/emulated_gpu``), so real servers, ComfyUI's own memory manager, and
tensors that may not meet tensors of the CPU. Ranks and stock compute in bf16, as on such cards.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig.compare import compare_all
from rig.graphs import Graph
from rig.pair import EQUAL, STRICT, latent_error, run, run_stock
from rig.server import Server
from rig.trees import Tree
from rig.weight_graphs import with_loras, with_unet
from rig.weight_rows import KOHYA, ROWS, base_graph

CASES: dict[str, Callable[[Graph], Graph]] = {
    "bf16": lambda graph: graph,
    "weight_dtype fp8": lambda graph: with_unet(
        graph, "flux1-dev.safetensors", weight_dtype="fp8_e4m3fn"
    ),
    "fp8 checkpoint": ROWS["checkpoint, fp8"].graph,
    "LoRA": lambda graph: with_loras(graph, (KOHYA, 1.0)),
}
Servers = Callable[..., Server]


pytestmark = [
    pytest.mark.newest_only,
    pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled"),
]


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_parallel_with_dynamic_vram(
    servers: Servers, tree: Tree, case: str, record_property: Callable[[str, object], None]
) -> None:
    setup = {"device": "emulated"}
    graph = CASES[case](base_graph())
    stock = servers(tree, XDIT_STRATEGY="off", EMULATED_GPUS="1", **setup)
    expected = run_stock(stock, graph)
    assert "DynamicVRAM support detected" in stock.log_text(), "stock has no dynamic VRAM"
    ranks = servers(
        tree, XDIT_GPUS="0,1", XDIT_STRATEGY="ulysses", EMULATED_GPUS="2", **STRICT, **setup
    )
    before = ranks.status()
    got = run(ranks, graph)
    report = ranks.status()["last_run"]
    difference = compare_all(expected.images, got.images)
    error = latent_error(expected.latents, got.latents)
    record_property(case, f"{difference}, latent {error:.1e}")
    assert report["steps_parallel"] == report["steps"] > 0, report
    for old, new in zip(before["ranks"], ranks.status()["ranks"], strict=True):
        assert new["forwards"] - old["forwards"] == report["steps"]
    assert difference.max_pixel <= EQUAL.max_pixel, difference
    assert difference.psnr_db >= EQUAL.min_psnr_db, difference
