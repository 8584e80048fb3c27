"""Run one graph on stock ComfyUI and on several ranks in strict mode, and hold them equal.

Runs in: the tests.

Checked for every pair: the images are equal up to rounding and are pictures; the latents are close;
every step ran in parallel, on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rig.compare import MAX_PIXEL_DIFFERENCE, MIN_PSNR_DB, Difference, compare_all
from rig.graphs import Graph
from rig.outputs import Latent, Pixels
from rig.server import Server
from rig.trees import Tree

STRICT = {"XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
DEADLINE_S = 600.0
LATENT_BOUND = 1e-3  # after a whole run of a sampler; a single forward is held to 1e-5 elsewhere


@dataclass(frozen=True)
class Bound:
    """How close two results must be."""

    max_pixel: int = MAX_PIXEL_DIFFERENCE
    min_psnr_db: float = MIN_PSNR_DB
    max_latent_error: float = LATENT_BOUND


EQUAL = Bound()
# Where a kernel rounds activations (int8), an error of 1e-7 in one of them moves it by 1/127 of its
# row's largest. Stock against stock with another of ComfyUI's attention functions (0.33.0,
# 128 x 128 px, 2 steps) differs by up to 6/255, 48.2 dB and 1.3e-2 of the latent.
NOISY = Bound(max_pixel=6, min_psnr_db=48.0, max_latent_error=1.5e-2)
FLAT = 5.0  # standard deviation of pixels; a flatter image proves nothing


@dataclass(frozen=True)
class Result:
    """What one server made of a graph."""

    images: list[Pixels]
    latents: list[Latent]


@dataclass(frozen=True)
class Pair:
    """Two equal results, and what the ranks said before and after."""

    stock: Result
    ranks: Result
    difference: Difference
    latent_error: float
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """Return the ranks' report of the sampling run."""
        report: dict[str, Any] = self.after["last_run"]
        return report


_stock_results: dict[tuple[str, str], Result] = {}


def run_stock(server: Server, graph: Graph) -> Result:
    """Run a graph on stock ComfyUI, once for each server and graph."""
    key = (server.url, json.dumps(graph, sort_keys=True))
    if key not in _stock_results:
        result = run(server, graph)
        flattest = min(float(image.std()) for image in result.images)
        assert flattest > FLAT, f"a flat image proves nothing: standard deviation {flattest:.1f}"
        _stock_results[key] = result
    return _stock_results[key]


def run(server: Server, graph: Graph) -> Result:
    """Run a graph and read what it wrote; the graph must save its latent."""
    history = server.run(graph, DEADLINE_S)
    return Result(server.images(history), server.latents(history))


def run_pair(
    servers: Callable[..., Server],
    tree: Tree,
    graph: Graph,
    num_ranks: int,
    *,
    env: Mapping[str, str] | None = None,
    bound: Bound = EQUAL,
    **setup: Any,
) -> Pair:
    """Run a graph on both servers and compare; any inequality is an AssertionError.

    Args:
        env: further settings of the server with ranks.
        setup: what both servers have, apart from settings.
    """
    stock = run_stock(servers(tree, XDIT_STRATEGY="off", **setup), graph)
    settings = {"XDIT_GPUS": f"cpu:{num_ranks}", **STRICT, **(env or {})}
    server = servers(tree, **settings, **setup)
    before = server.status()
    ranks = run(server, graph)
    after = server.status()
    difference = compare_all(stock.images, ranks.images)
    is_equal = difference.max_pixel <= bound.max_pixel and difference.psnr_db >= bound.min_psnr_db
    assert is_equal, f"the image is not stock's: {difference}"
    error = latent_error(stock.latents, ranks.latents)
    assert error <= bound.max_latent_error, f"the latent is not stock's: relative error {error:.1e}"
    report = after["last_run"]
    assert report["steps_fell_back"] == 0, f"steps fell back: {report['fall_back_reasons']}"
    assert report["steps_parallel"] == report["steps"] > 0, f"not every step: {report}"
    for old, new in zip(before["ranks"], after["ranks"], strict=True):
        forwards = new["forwards"] - old["forwards"]
        assert forwards == report["steps"], f"every rank, every step; got {forwards}: {new}"
    return Pair(stock, ranks, difference, error, before, after)


def latent_error(references: list[Latent], others: list[Latent]) -> float:
    """Return the largest error of any latent, relative to the largest value in it."""
    return max(
        float(np.abs(a - b).max() / np.abs(a).max())
        for a, b in zip(references, others, strict=True)
    )
