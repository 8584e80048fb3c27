"""PipeFusion, an approximation: where it is exact, how far off it is elsewhere, what it forgets.

Exact calls ("warm-up") equal stock. So does any call whose inputs are those of the call before: the
keys and values that it finds are the ones that it would compute. That leaves no room for a token
that is dropped, counted twice or put in another's place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import BOUND, STRICT, answer_of
from inside.client import Inside
from rig.feature_packs import ATTENTION_PATCHES
from rig.trees import Tree
from test_strategies import EVEN, FLOAT32, ODD, following

from comfy_xdit_patch.planning.plan import ParallelPlan

AGAIN: list[dict[str, Any]] = [{}, {}]
DEV = {
    "odd": ODD,
    "references": ODD | {"refs": [[9, 9], [16, 8]]},
    "ControlNet residuals": ODD | {"control": 20, "refs": [[9, 9]]},
    "LoRA": ODD | {"lora": True},
    "attention mask, batch 2": ODD | {"mask": True, "refs": [[9, 9]], "batch": 2},
}
FAMILY = {
    "flux2": ODD | {"refs": [[7, 9]], "ref_method": "index"},
    "chroma": ODD | {"batch": 2, "control": 35, "mask": True},
}
FIRST = {"sigma": 0.8}
RESETS = {
    "a new run": ([FIRST], [True]),
    "the same again": ([FIRST, FIRST], [True, False]),
    "falling sigma": ([FIRST, {"sigma": 0.7}, {"sigma": 0.7}], [True, False, False]),
    "rising sigma": ([FIRST, {"sigma": 0.7}, {"sigma": 0.75}], [True, False, True]),
    "a step that was not computed here": ([FIRST, {"sigma": 0.6}], [True, True]),
    "another shape": ([FIRST, FIRST | {"sizes": {"width": 20}}, FIRST], [True, True, True]),
    "another prompt in the same stream": (
        [FIRST, FIRST | {"prompt": True}, FIRST | {"prompt": True}],
        [True, True, False],
    ),
    "cond and uncond one after the other": (
        [FIRST, FIRST | {"cond": 1}, FIRST, FIRST | {"cond": 1}],
        [True, True, False, False],
    ),
    "a ControlNet that comes in": ([FIRST, FIRST | {"sizes": {"control": 20}}], [True, True]),
}


class Runs:
    """The same sampling run in stock ComfyUI and on ranks."""

    def __init__(self, stock: Inside, ranks: Inside, tmp_path: Path) -> None:
        self._stock, self.ranks, self._tmp_path = stock, ranks, tmp_path

    def run(
        self, path: str, calls: list[dict[str, Any]], **case: Any
    ) -> tuple[list[float], list[bool], dict[str, Any]]:
        """Return the relative error of each call, which of them were exact, and the status."""
        common = {"path": path, "calls": calls, **case}
        expected = answer_of(self._stock, "pipelined:run", self._tmp_path, **common)
        out = str(self._tmp_path / "ranks.pt")
        found = self.ranks.call("pipelined:run", out=out, **common)
        got = torch.load(out)
        assert min(tensor.abs().max() for tensor in expected) > 0.1
        errors = [
            ((b - a).abs().max() / a.abs().max()).item() for a, b in zip(expected, got, strict=True)
        ]
        assert found["status"]["last_run"]["steps_parallel"] == len(calls)
        assert found["status"]["last_run"]["steps_warm_up"] == sum(found["exact"])
        return errors, found["exact"], found["status"]


@pytest.mark.group("3")
def test_exact_calls_and_calls_with_unchanged_inputs_equal_stock(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    runs = Runs(stock, inside(tree, XDIT_GPUS="cpu:3", **STRICT), tmp_path)
    paths = dict.fromkeys(DEV, flux_dev(hidden=512, double=2, single=2))
    for family in FAMILY:
        paths[family] = str(tmp_path / f"{family}.safetensors")
        sizes = {"hidden": 512, "double": 2, "single": 2, "context": 64}
        stock.call("families:write_model", path=paths[family], family=family, **sizes)
    with following(runs.ranks, "pipefusion"):
        for name, case in {**DEV, **FAMILY}.items():
            errors, exact, status = runs.run(paths[name], AGAIN, **case)
            record_property(f"{tree.version} pipefusion=3, {name}", errors)
            assert exact == [True, False]
            assert max(errors) <= BOUND, name
            assert status["last_run"]["plan"] == "pipefusion=3"
            assert status["last_run"]["is_exact"] is False
            held = [rank["weight_bytes"] for rank in status["ranks"]]
            # In float32, which the file is not.
            whole = 2 * Path(paths[name]).stat().st_size
            assert max(held) < 0.9 * whole <= sum(held), "a rank has the blocks of its stage"


@pytest.mark.group("3")
@pytest.mark.newest_only
def test_a_stream_begins_anew_when_anything_but_the_latent_and_sigma_changes(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    runs = Runs(stock, inside(tree, XDIT_GPUS="cpu:3", **STRICT), tmp_path)
    path = flux_dev(hidden=512, double=2, single=2)
    with following(runs.ranks, "pipefusion"):
        for name, (calls, expected) in RESETS.items():
            errors, exact, _ = runs.run(path, calls, **ODD)
            assert exact == expected, name
            wrong = [e for e, is_exact in zip(errors, exact, strict=True) if is_exact]
            assert max(wrong) <= BOUND, name


@pytest.mark.group("3")
@pytest.mark.newest_only
def test_the_error_falls_with_the_difference_of_inputs_that_follow_each_other(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    runs = Runs(stock, inside(tree, XDIT_GPUS="cpu:3", **STRICT), tmp_path)
    path = flux_dev(hidden=512, double=2, single=2)
    found = {}
    with following(runs.ranks, "pipefusion"):
        for noise in (0.3, 0.1, 0.03, 0.01, 0.0):
            errors, exact, _ = runs.run(path, [{}, {"noise": noise}], **ODD)
            assert exact == [True, False]
            found[noise] = errors[1]
    record_property("error by difference", found)
    values = list(found.values())
    assert values == sorted(values, reverse=True)
    assert 1e-4 < found[0.3] < 0.3, "it is an approximation, and a bounded one"
    assert found[0.01] < 0.1 * found[0.3]
    assert found[0.0] <= BOUND


@pytest.mark.group("3")
@pytest.mark.newest_only
def test_a_run_that_cannot_be_pipelined_is_refused_with_its_reason(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> None:
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    few = flux_dev(hidden=512, double=1, single=1)
    radiance = str(tmp_path / "radiance.safetensors")
    model = {"family": "chroma_radiance_linear", "hidden": 512, "double": 2, "single": 2}
    ranks.call("families:write_model", path=radiance, context=64, **model)
    path = flux_dev(hidden=512, double=2, single=2)
    pixels = ODD | {"height": 70, "width": 99}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("pipefusion=3 is more than the 2 blocks", few, ODD),
        ("models that work on pixels", radiance, pixels),
        ("a node replaces blocks", path, ODD | {"replaces_blocks": True}),
        ("a node set a attn1_output_patch", path, ODD | {"patches_attention": True}),
        ("a node chose the attention function", path, ODD | {"chooses_attention": True}),
        ("has to know the sigmas of the run", path, ODD | {"sigmas": 0}),
        ("where a run begins and ends", path, ODD),
        ("needs 5 steps or more", path, ODD | {"sigmas": 5}),
    ]
    if not tree.has(ATTENTION_PATCHES):
        cases = [case for case in cases if "patches_attention" not in case[2]]
    with following(ranks, "pipefusion"):
        for reason, of_model, case in cases:
            with pytest.raises(RuntimeError, match=reason):
                ranks.call("pipelined:lone", path=of_model, **case)


@pytest.mark.group("4")
@pytest.mark.newest_only
def test_hybrid_plans_are_exact_where_they_must_be_and_move_the_bytes_of_the_formulas(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    runs = Runs(stock, inside(tree, XDIT_GPUS="cpu:4", **STRICT), tmp_path)
    path = flux_dev(hidden=512, double=2, single=2)
    for plan in (
        ParallelPlan(ulysses=2, pipefusion=2),
        ParallelPlan(pipefusion=4),
        ParallelPlan(batch=2, pipefusion=2),
    ):
        with following(runs.ranks, plan.name):
            case = ODD | {"refs": [[9, 9]], "batch": plan.batch}
            errors, exact, _ = runs.run(path, AGAIN, **case)
            record_property(f"{plan.name}", errors)
            assert exact == [True, False]
            assert max(errors) <= BOUND, plan.name
            before = runs.ranks.call("forwards:status")["totals"]["bytes_between_ranks"]
            even = EVEN | {"batch": plan.batch}
            _, _, status = runs.run(path, AGAIN, **even, **FLOAT32)
            moved = status["totals"]["bytes_between_ranks"] - before
            record_property(f"{plan.name}, bytes of two calls", moved)
            assert moved == 2 * expected_bytes(plan, hidden=512, num_blocks=4)


def expected_bytes(plan: ParallelPlan, *, hidden: int, num_blocks: int) -> int:
    """What all ranks send in one forward of ``EVEN``, in float32, exact or not."""
    text, image, u = 24, 48, plan.ulysses
    whole = (text + image) * hidden * 4  # S D e
    boundaries = (plan.pipefusion - 1) * whole
    attention = num_blocks * u * 4 * (whole // u) * (u - 1) // u
    output = image // u * 64 * 4 * (u - 1) * u  # gathered in the last stage
    return plan.batch * (boundaries + attention + output)
