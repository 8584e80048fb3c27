"""ComfyUI as on NVIDIA cards, with dynamic VRAM: all steps are parallel and equal to stock.

Two emulated cards (``rig/emulated_gpu``), so real servers, ComfyUI's own memory manager, and
tensors that may not meet tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from rig.compare import compare_all
from rig.faults import descendants
from rig.graphs import Graph, with_values
from rig.pair import EQUAL, STRICT, Bound, latent_error, run, run_stock
from rig.server import Server
from rig.trees import Tree
from rig.weight_graphs import with_compute_dtype, with_loader, with_loras, with_unet
from rig.weight_rows import KOHYA, SEED, base_graph

Servers = Callable[..., Server]

pytestmark = [
    pytest.mark.newest_only,
    pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled"),
]

# What is around the model computes in fp32: the CPU takes seconds for fp16 and bf16, and the
# rounding of a VAE in bf16 would hide the model's.
EXTRA_ARGS = ("--fp32-vae", "--fp32-text-enc")
# Ranks compute with other numbers of rows than stock does, and matrices in bf16 are rounded
# differently then. Stock against stock with another of ComfyUI's attention functions (0.33.0,
# these cases) differs by up to 3/255, 52.7 dB and 5.8e-3 of the latent; stock in bf16 against stock
# in fp32 by 215/255, 12.7 dB and 0.36.
BF16 = Bound(max_pixel=3, min_psnr_db=52.5, max_latent_error=6e-3)
BOUNDS = {None: BF16, "fp32": EQUAL}  # by what a node asks for; such cards compute in bf16


def _same(graph: Graph) -> Graph:
    return graph


def _fp8_checkpoint(graph: Graph) -> Graph:
    """Only its diffusion model: text encoders and VAE are those of the other cases."""
    return with_loader(graph, "CheckpointLoaderSimple", ckpt_name="flux1-dev-fp8.safetensors")


@dataclass(frozen=True)
class Case:
    """One way in which weights come to the cards.

    Attributes:
        is_rounded_late: stock computes with a patched weight first and rounds it to the dtype of
            the file then, as ranks do at once. So it runs once before the image that is compared.
    """

    graph: Callable[[Graph], Graph]
    is_rounded_late: bool = False


CASES = {
    "bf16": Case(_same),
    "LoRA": Case(lambda graph: with_loras(graph, (KOHYA, 1.0)), is_rounded_late=True),
    "weight_dtype fp8": Case(
        lambda graph: with_unet(graph, "flux1-dev.safetensors", weight_dtype="fp8_e4m3fn")
    ),
    "fp8 checkpoint": Case(_fp8_checkpoint),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_parallel_with_dynamic_vram(
    servers: Servers, tree: Tree, case: str, record_property: Callable[[str, object], None]
) -> None:
    setup = {"device": "emulated", "hidden": 256, "extra_args": EXTRA_ARGS, "node_packs": ()}
    stock = servers(tree, XDIT_STRATEGY="off", EMULATED_CARDS="4090", **setup)
    ranks = servers(
        tree,
        XDIT_GPUS="0,1",
        XDIT_STRATEGY="ulysses",
        EMULATED_CARDS="4090,4090",
        **STRICT,
        **setup,
    )
    for server in (stock, ranks):
        assert "DynamicVRAM support detected" in server.log_text()
    for dtype, bound in BOUNDS.items():
        graph = CASES[case].graph(base_graph())
        if dtype is not None:
            graph = with_compute_dtype(graph, dtype)
            if CASES[case].is_rounded_late:
                run(stock, with_values(graph, seed=SEED + 1))
        expected = run_stock(stock, graph)
        before = ranks.status()["ranks"]
        got = run(ranks, graph)
        after = ranks.status()
        difference = compare_all(expected.images, got.images)
        error = latent_error(expected.latents, got.latents)
        record_property(f"{case}, {dtype}", f"{difference}, latent {error:.1e}")
        assert after["residency"][0].startswith("weights cast once") == ("fp8" in case)
        report = after["last_run"]
        assert report["steps_fell_back"] == 0, report["fall_back_reasons"]
        assert report["steps_parallel"] == report["steps"] > 0, report
        for old, new in zip(before, after["ranks"], strict=True):
            assert new["forwards"] - old["forwards"] == report["steps"]
        assert difference.max_pixel <= bound.max_pixel, difference
        assert difference.psnr_db >= bound.min_psnr_db, difference
        assert error <= bound.max_latent_error, error


@pytest.mark.slow  # six images on emulated cards
@pytest.mark.thorough
def test_cards_are_taken_and_given_back_without_a_restart(servers: Servers, tree: Tree) -> None:
    setup = {"device": "emulated", "hidden": 256, "extra_args": EXTRA_ARGS, "node_packs": ()}
    stock = servers(tree, XDIT_STRATEGY="off", EMULATED_CARDS="4090", **setup)
    cards = {"EMULATED_CARDS": "4090,4090,4090"}
    ranks = servers(tree, XDIT_GPUS="0,1", XDIT_STRATEGY="ulysses", **cards, **STRICT, **setup)
    assert ranks.process is not None
    graph = with_compute_dtype(base_graph(), "fp32")
    for number, (values, num_ranks) in enumerate(
        (
            ({"XDIT_STRATEGY": "ring"}, 2),
            ({"XDIT_STRATEGY": "off"}, 0),
            ({"XDIT_STRATEGY": None, "XDIT_GPUS": "2,1"}, 2),
            ({"XDIT_GPUS": "all"}, 3),
            ({"XDIT_GPUS": "0"}, 0),
            ({"XDIT_GPUS": None}, 2),
        )
    ):
        ranks.request("/xdit/settings", values)
        row = with_values(graph, seed=SEED + 2 + number)
        expected = run_stock(stock, row)
        difference = compare_all(expected.images, run(ranks, row).images)
        assert difference.is_equal, f"{difference} after {values}"
        assert len(descendants(ranks.process.pid)) == (num_ranks + 1 if num_ranks else 0), values
        if num_ranks:
            report = ranks.status()["last_run"]
            assert (report["steps_parallel"], report["ranks"]) == (report["steps"], num_ranks)
