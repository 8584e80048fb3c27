"""Unmodified workflows over HTTP: every step parallel, every image equal to stock ComfyUI's.

Bounds (design section 11): max 2/255 and PSNR 70 dB on pixels. Latents are compared too, and the
worst relative error of each server is reported with the test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig import graphs
from rig.breadth import is_whole
from rig.pair import run_pair
from rig.server import Server
from rig.trees import Tree

Servers = Callable[..., Server]

# T5 counts a token for each of these words; ComfyUI pads shorter prompts to 256.
LONG = {257: "a " * 256, 700: "a " * 699}

WORKFLOWS = ("ksampler_dev", "ksampler_schnell", "sampler_custom_advanced_dev", "checkpoint_dev")
ODD: dict[str, dict[str, object]] = {
    "72x104 px": {"size": (72, 104)},
    "1000x616 px": {"size": (1000, 616), "steps": 1},
    "257 tokens": {"prompt": LONG[257]},
    "700 tokens": {"prompt": LONG[700]},
    "batch 2": {"batch_size": 2},
    "batch 3": {"batch_size": 3},
    "batch 4": {"batch_size": 4},
    "cfg 3": {"cfg": 3.0, "negative": "blurry"},
    "cfg 3, batch 2": {"cfg": 3.0, "negative": "blurry", "batch_size": 2},
    "4 latent channels": {"latent_node": "EmptyLatentImage"},
    "16 latent channels": {"latent_node": "EmptySD3LatentImage"},
    "heun": {"sampler_name": "heun"},
    "dpmpp_2m": {"sampler_name": "dpmpp_2m"},
    "dpmpp_2m_sde": {"sampler_name": "dpmpp_2m_sde"},
    "uni_pc": {"sampler_name": "uni_pc"},
    "lcm": {"sampler_name": "lcm"},
}
# One for each way in which a call can be odd: size, text, batch, CFG, latent, calls in a step.
SOME_ODD = ("72x104 px", "700 tokens", "batch 3", "cfg 3, batch 2", "4 latent channels", "heun")
# Model calls of 4 steps: second-order samplers make more than one for a step.
CALLS = {"heun": 7}


@pytest.mark.every_version
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_equals_stock(
    servers: Servers,
    tree: Tree,
    num_ranks: int,
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    graph = graphs.with_values(
        graphs.load(name), seed=11, size=(256, 192), steps=4, save_latent=True
    )
    pair = run_pair(servers, tree, graph, num_ranks)
    record_property("latent error", pair.latent_error)
    assert pair.run["steps"] == 4, "one model call for each step of euler"


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.thorough), 3])
def test_odd_cases_equal_stock(
    servers: Servers,
    tree: Tree,
    num_ranks: int,
    record_property: Callable[[str, object], None],
) -> None:
    base = graphs.with_values(
        graphs.load("ksampler_dev"), seed=12, size=(128, 128), steps=4, save_latent=True
    )
    for name in ODD if is_whole() else SOME_ODD:
        values = ODD[name]
        graph = graphs.with_values(base, **values)  # type: ignore[arg-type]
        pair = run_pair(servers, tree, graph, num_ranks)
        record_property(f"{name}: latent error", pair.latent_error)
        if name in CALLS:
            assert pair.run["steps"] == CALLS[name], name
