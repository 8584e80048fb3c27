"""Forwards on ranks of unequal shares equal stock's, under every exact strategy.

Weights are set in a running process; how they are learned is in the last test, where one rank is
really slower, and in tests/unit/planning/test_balance.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import BOUND, STRICT
from inside.client import Inside
from rig import controls
from rig.breadth import sampled
from rig.slowed import Slowed
from rig.trees import Tree
from safetensors.torch import save_file

ODD = {"height": 9, "width": 13, "batch": 1, "text_tokens": 77}
WHOLE = {
    "odd": ODD,
    "references": ODD | {"refs": [[9, 9], [16, 8]]},
    "ControlNet residuals, references": ODD | {"control": 20, "refs": [[9, 9]]},
    "attention mask, references, batch 2": ODD | {"mask": True, "refs": [[9, 9]], "batch": 2},
    "a patch after attention": ODD | {"refs": [[7, 6]], "patches_attention": True},
    "blocks in ComfyUI's process": ODD | {"refs": [[7, 6]], "replaces_blocks": True},
}
FAMILY = {
    "flux2": ODD | {"refs": [[7, 9]], "ref_method": "index"},
    "chroma": ODD | {"batch": 2, "control": 35, "mask": True},
}
# A node's code, and one mask for all rows, leave the batch whole.
ROWS = {"three rows, references": ODD | {"batch": 3, "refs": [[9, 9]]}}
OF_3 = [("ulysses", [1, 2, 3]), ("ring", [3, 1, 2])]
OF_4 = [
    ("usp", [1, 1, 4, 2]),
    ("batch=2,ulysses=2", [1, 1, 4, 2]),
    ("batch=2,ring=2", [3, 1, 2, 2]),
]


class Comparison:
    """The same calls in stock ComfyUI and on ranks."""

    def __init__(self, stock: Inside, ranks: Inside, folder: Path) -> None:
        self._stock, self._ranks, self._folder = stock, ranks, folder

    def expect(self, name: str, body: str = "forwards:forward", **case: Any) -> None:
        self._stock.call(body, out=str(self._folder / f"{name}.pt"), **case)

    def error(self, name: str, body: str = "forwards:forward", **case: Any) -> float:
        before = self._ranks.call("forwards:status")
        after = self._ranks.call(body, out=str(self._folder / "ranks.pt"), **case)
        assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1, name
        expected = torch.load(self._folder / f"{name}.pt")
        got = torch.load(self._folder / "ranks.pt")
        assert expected.abs().max() > 0.1, "a model that answers zero proves nothing"
        return float((got - expected).abs().max() / expected.abs().max())


def follow(ranks: Inside, strategy: str, weights: list[int]) -> None:
    ranks.call("steering:use_strategy", text=strategy)
    ranks.call("steering:use_weights", weights=weights)
    assert ranks.call("forwards:status")["weights"] == weights


def models(stock: Inside, flux_dev: Callable[..., str], folder: Path) -> dict[str, str]:
    paths = dict.fromkeys((*WHOLE, *ROWS), flux_dev(hidden=768, double=1, single=1))
    for family in FAMILY:
        paths[family] = str(folder / f"{family}.safetensors")
        sizes = {"hidden": 512, "double": 1, "single": 1, "context": 64}
        stock.call("families:write_model", path=paths[family], family=family, **sizes)
    return paths


@pytest.mark.group("3")
@pytest.mark.newest_only
def test_weights_of_three_ranks(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    check(
        stock,
        ranks,
        flux_dev,
        tmp_path,
        record_property,
        OF_3,
        sampled({**WHOLE, **FAMILY}, every=2),
    )


@pytest.mark.group("4")
@pytest.mark.newest_only
def test_weights_of_four_ranks_in_two_axes(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:4", **STRICT)
    mask = "attention mask, references, batch 2"
    check(stock, ranks, flux_dev, tmp_path, record_property, OF_4[:1], {mask: WHOLE[mask]})
    check(stock, ranks, flux_dev, tmp_path, record_property, OF_4, ROWS)


def check(
    stock: Inside,
    ranks: Inside,
    flux_dev: Callable[..., str],
    folder: Path,
    record_property: Callable[[str, object], None],
    plans: list[tuple[str, list[int]]],
    cases: dict[str, dict[str, Any]],
) -> None:
    comparison = Comparison(stock, ranks, folder)
    paths = models(stock, flux_dev, folder)
    for name, case in cases.items():
        comparison.expect(name, path=paths[name], **case)
    try:
        for strategy, weights in plans:
            follow(ranks, strategy, weights)
            for name, case in cases.items():
                error = comparison.error(name, path=paths[name], **case)
                record_property(f"{strategy} {weights}, {name}", error)
                assert error <= BOUND, (strategy, weights, name)
    finally:
        follow(ranks, "auto", [])


@pytest.mark.newest_only
def test_two_ranks_by_weight_with_a_controlnet_and_one_that_is_slowed(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:2", **STRICT | {"XDIT_BALANCE": "adaptive"})
    comparison = Comparison(stock, ranks, tmp_path)
    path = flux_dev(hidden=768, double=1, single=1)
    control = str(tmp_path / "union.safetensors")
    union = controls.instantx(768, 5, double=1, single=1, modes=controls.MODES)
    save_file(dict(union), control)
    case = ODD | {"path": path, "control_path": control, "refs": [[7, 6]]}
    comparison.expect("ControlNet", "controlled:forward", **case)
    for strategy in ("ulysses", "ring"):
        follow(ranks, strategy, [3, 1])
        error = comparison.error("ControlNet", "controlled:forward", **case)
        record_property(f"{strategy} [3, 1], ControlNet", error)
        assert error <= BOUND, strategy
    status = ranks.call("forwards:status")
    assert (status["totals"]["controls_parallel"], status["controls_alone"]) == (2, [])

    follow(ranks, "ulysses", [])
    sizes = {"height": 48, "width": 64, "batch": 1, "text_tokens": 77}
    comparison.expect("slowed", path=path, **sizes)
    with Slowed(status["ranks"][1]["pid"], 0.4):
        for _ in range(8):
            assert comparison.error("slowed", path=path, **sizes) <= BOUND
        status = ranks.call("forwards:status")
        times = ranks.call("forwards:run_of_calls", path=path, calls=5, **sizes)[1:]
        ranks.call("steering:use_balance", name="even", mode="even")
        even = ranks.call("forwards:run_of_calls", path=path, calls=5, **sizes)[1:]
    record_property("rank 1 at 0.4 of its speed", str(status["weights"]))
    for name, of_calls in (("even", even), ("adaptive", times)):
        busy = [statistics.median(call["busy"][rank] for call in of_calls) for rank in (0, 1)]
        step_s = statistics.median(call["host"] for call in of_calls)
        record_property(f"{name}: s/step, busy s by rank", str((step_s, busy)))
    assert status["totals"]["share_changes"] >= 1
    assert status["weights"][0] > 1.3 * status["weights"][1]
