"""What people load and build, on emulated cards: every step parallel and equal to stock.

Kinds of weights and of graphs, of each the ones whose way to the cards differs; with dynamic VRAM
and without, on two cards and on three, on cards with fp8 and without. What is computed is fp32, in
which rounding does not hide a fault, unless it says so. The smaller twin that always runs is
test_emulated_cards.py.

    EMULATED_ALL=1            runs it: an hour and more
    EMULATED_ROWS=<pattern>   picks rows by name
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from rig.environment import RigError
from rig.feature_models import feature_models
from rig.feature_rows import PARALLEL
from rig.feature_run import COMMON_PACKS, ROUNDED, run_row
from rig.feature_table import FEATURES
from rig.graphs import with_values
from rig.pair import EQUAL, STRICT, Bound, run, run_pair
from rig.server import Server
from rig.trees import Tree
from rig.weight_graphs import with_compute_dtype
from rig.weight_rows import ROWS, SEED, SETUP, base_graph

Servers = Callable[..., Server]
Record = Callable[[str, object], None]

pytestmark = [
    pytest.mark.newest_only,
    pytest.mark.thorough,
    pytest.mark.slow,  # every call with a card's tensor passes through Python
    pytest.mark.skipif("EMULATED_ALL" not in os.environ, reason="an hour and more: EMULATED_ALL=1"),
    pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled"),
]

CARDS = ("4090,4090", "3090,3090", "4090,4090,4090", "4090,3090")
MEMORY = {"dynamic VRAM": (), "legacy": ("--disable-dynamic-vram",)}
AROUND = ("--fp32-vae", "--fp32-text-enc")
"""What is around the model; the CPU takes seconds for it in 16 bits."""

# Cards with fp8 quantise what goes into a layer of mixed fp8 as well, and a value that is rounded
# the other way moves by 6 %. Stock against stock with another of ComfyUI's attention functions
# (0.33.0, these rows) differs by up to 17/255, 40.9 dB and 2.3e-2 of the latent; ranks against
# stock by up to 16/255 and 39.8 dB.
FP8_INPUT = Bound(max_pixel=20, min_psnr_db=39.0, max_latent_error=3e-2)
WEIGHTS = (
    *("plain", "LoRA, kohya"),
    *("fp16 file", "fp16 file + LoRA"),
    *("bf16 file, fp32 vectors", "bf16 file, fp32 vectors + LoRA"),
    *("fp8 file", "fp8 file + LoRA"),
    *("fp8_e4m3fn", "fp8_e4m3fn + LoRA"),
    *("scaled fp8", "scaled fp8 + LoRA"),
    *("mixed fp8", "mixed fp8 + LoRA"),
    *("nvfp4", "nvfp4 + LoRA"),
    *("GGUF Q8_0", "GGUF Q8_0 + LoRA"),
    *("checkpoint, bf16", "checkpoint, bf16 + LoRA"),
    *("checkpoint, fp8", "checkpoint, fp8 + LoRA"),
    *("checkpoint, scaled-fp8", "checkpoint, mixed-fp8-tensors"),
)
STRATEGIES = ("ring", "tensor", "fsdp", "pipefusion")
# PipeFusion uses keys of the step before; test_named_strategies.py says more of it.
APPROXIMATE = Bound(max_pixel=255, min_psnr_db=25.0, max_latent_error=1.0)
IN_BF16 = " in bf16"
"""After the name of a row: what such cards compute in, but for what a graph asks for."""
ALSO_IN_BF16 = ("fp16 file", "fp16 file + LoRA", "bf16 file, fp32 vectors")
GRAPHS = (
    "FLUX.1 Kontext",
    "InstantX",
    "FLUX.1 Redux, attention mask",
    "FLUX.2 dev",
    "Chroma",
    "DualModelGuider",
)
# With hooks, dynamic VRAM computes by a second model, whose weights keep the dtype of the file:
# stock ComfyUI 0.33.0 fails itself if that is not what it computes in (--fp32-unet).
HOOKS = ("LoRA scheduled by hooks",)


def chosen(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if re.search(os.environ.get("EMULATED_ROWS", ""), name)]


def on_cards(cards: str, memory: str, *more: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What both servers have, and what the one with ranks has."""
    arguments = (*AROUND, *MEMORY[memory], *more)
    setup = {"device": "emulated", "extra_args": arguments, "EMULATED_CARDS": cards}
    numbers = ",".join(str(number) for number in range(cards.count(",") + 1))
    return setup, {"XDIT_GPUS": numbers, "XDIT_STRATEGY": "ulysses", **STRICT}


def check_all(names: list[str], check: Callable[[str], str], record: Record) -> None:
    """Check every row, and name all that fail."""
    failures = []
    for name in names:
        try:
            record(name, check(name))
        except (AssertionError, RigError) as error:
            first, *rest = str(error).splitlines()
            failures.append("\n".join([f"{name}: {first}", *rest[-12:]]))
    assert not failures, f"{len(failures)} of {len(names)} failed:\n" + "\n".join(failures)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("cards", CARDS)
def test_every_kind_of_weights_is_parallel_and_equal(
    servers: Servers, tree: Tree, cards: str, memory: str, record_property: Record
) -> None:
    setup, settings = on_cards(cards, memory)

    def check(label: str) -> str:
        name = label.removesuffix(IN_BF16)
        row = ROWS[name]
        if not row.runs_on(tree):
            return "not in this version"
        dtype, bound = ("fp32", EQUAL) if label == name else ("bf16", ROUNDED)
        if "mixed" in name:
            bound = FP8_INPUT
        graph = with_compute_dtype(row.graph(base_graph()), dtype)
        if "LoRA" in name and memory == "dynamic VRAM":
            # Stock computes with a patched weight before it rounds it to the dtype of the file, as
            # ranks do at once. So it computes once before the image that is compared.
            stock = servers(tree, XDIT_STRATEGY="off", **{**SETUP, **setup})
            run(stock, with_values(graph, seed=SEED + 1))
        pair = run_pair(
            servers,
            tree,
            graph,
            cards.count(",") + 1,
            env=settings,
            bound=bound,
            **{**SETUP, **setup},
        )
        return f"{pair.difference}, latent {pair.latent_error:.1e}"

    labels = (*WEIGHTS, *(name + IN_BF16 for name in ALSO_IN_BF16))
    check_all(chosen(labels), check, record_property)


@pytest.mark.parametrize(
    ("names", "in_fp32"), [(GRAPHS, ("--fp32-unet",)), (HOOKS, ())], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("cards", CARDS[:3:2])
def test_every_kind_of_graph_is_parallel_and_equal(
    servers: Servers,
    tree: Tree,
    cards: str,
    memory: str,
    names: tuple[str, ...],
    in_fp32: tuple[str, ...],
    record_property: Record,
) -> None:
    setup, settings = on_cards(cards, memory, *in_fp32)
    common = {"models": feature_models(), "node_packs": COMMON_PACKS, **setup}

    def check(name: str) -> str:
        row = FEATURES[name]
        if not row.runs_on(tree):
            return "not in this version"
        stock = servers(tree, XDIT_STRATEGY="off", **common)
        bound = EQUAL if in_fp32 else ROUNDED
        found = run_row(stock, servers(tree, **settings, **common), row, bound)
        assert found.outcome == PARALLEL, f"{found}: {found.reasons}"
        return str(found)

    check_all(chosen(names), check, record_property)


@pytest.mark.parametrize("memory", MEMORY)
def test_every_strategy_is_parallel_and_uses_nothing_that_is_still_on_its_way(
    servers: Servers, tree: Tree, memory: str, record_property: Record
) -> None:
    """Emulated cards fail a use of what an exchange works with before somebody waited for it."""
    graph = with_compute_dtype(with_values(base_graph(), steps=5), "fp32")

    def check(strategy: str) -> str:
        setup, settings = on_cards(CARDS[0], memory)
        env = {**settings, "XDIT_STRATEGY": strategy}
        bound = APPROXIMATE if strategy == "pipefusion" else EQUAL
        pair = run_pair(servers, tree, graph, 2, env=env, bound=bound, **{**SETUP, **setup})
        return f"{pair.difference}, latent {pair.latent_error:.1e}"

    check_all(chosen(STRATEGIES), check, record_property)
