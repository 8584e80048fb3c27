"""Blocks that the user has compiled run compiled on the ranks, and equal stock ComfyUI.

The ranks' own counts say that: how many blocks ran compiled, and what was compiled for it.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import BOUND, STRICT
from inside.client import Inside
from rig.quantised import files as quantised_files
from rig.trees import Tree
from safetensors.torch import load_file, save_file
from test_strategies import following

SHARED, SHARDED = "ulysses=2,modulation=2", "ulysses=2,fsdp=2"
QUANTISED = "comfy/quant_ops.py", "class TensorCoreMXFP8Layout"
SIZES = {"double": 2, "single": 3}
NUM_BLOCKS = 5
CALL = {"height": 9, "width": 13, "batch": 1, "text_tokens": 77}
TALLER = {**CALL, "height": 12}
TALLEST = {**CALL, "height": 15}
Run = Callable[..., tuple[float, list[dict[str, Any]], str]]
"""Calls, and how they are compiled, to what ``run`` says."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler, which inductor needs on a CPU"
)


def thorough(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.thorough)


@pytest.fixture
def run(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> Run:
    """Make calls, compiled on two ranks and as they are in stock.

    Returns:
        The largest error, our status before and after each call, and what was logged.
    """
    stock = inside(tree, XDIT_STRATEGY="off")

    def compared(
        *calls: dict[str, Any],
        family: str = "",
        strategy: str = "",
        quantised: str = "",
        gib: str = "auto",
        options: dict[str, Any] | None = None,
        **compiled: Any,
    ) -> tuple[float, list[dict[str, Any]], str]:
        ranks = inside(tree, XDIT_GPUS="cpu:2", XDIT_GPU_MEMORY=gib, **STRICT)
        outs = [str(tmp_path / name) for name in ("stock.pt", "ranks.pt")]
        path = flux_dev(hidden=384, **SIZES)
        if family:
            path = str(tmp_path / f"{family}.safetensors")
            model = {"family": family, "hidden": 384, "context": 64, **SIZES}
            stock.call("families:write_model", path=path, **model)
        if quantised:
            file = quantised_files(load_file(path))[f"flux1-dev-{quantised}.safetensors"]
            path = str(tmp_path / f"{quantised}.safetensors")
            save_file(file.state, path, metadata=file.metadata)
        given = {"path": path, "calls": calls, "options": options}
        stock.call("compiled:calls", out=outs[0], **given)
        ranks.call("compiled:forget")  # What is compiled goes with the models.
        before = ranks.call("forwards:status")
        logged = len(ranks.log_text())
        with following(ranks, strategy) if strategy else nullcontext():
            found = ranks.call("compiled:calls", out=outs[1], **given, **compiled)
        expected, got = (torch.load(out) for out in outs)
        error = max(
            ((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, got, strict=True)
        )
        return error, [before, *found], ranks.log_text()[logged:]

    return compared


def compiled(found: list[dict[str, Any]]) -> list[list[int]]:
    """How many blocks each rank ran compiled, call by call."""
    return [[rank["blocks_compiled"] for rank in of_call["ranks"]] for of_call in found[1:]]


def graphs(found: list[dict[str, Any]]) -> list[list[int]]:
    """What each rank compiled, call by call."""
    counts = [[rank["graphs"] for rank in of_call["ranks"]] for of_call in found]
    return [
        [now - then for then, now in zip(*pair, strict=True)] for pair in itertools.pairwise(counts)
    ]


@pytest.mark.every_version
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("eager", marks=pytest.mark.thorough),
        pytest.param("inductor", marks=[needs_compiler, pytest.mark.thorough]),
    ],
)
def test_a_compiled_model_has_all_blocks_compiled_once(run: Run, backend: str) -> None:
    steps = [{**CALL, "seed": seed} for seed in range(3)]
    error, found, log = run(*steps, backend=backend)
    assert error <= BOUND
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 3
    assert graphs(found) == [[2, 2], [0, 0], [0, 0]], "one for each class of block, and no more"
    assert "run as they are" not in log


def test_other_sizes_are_compiled_once_more_and_then_for_all(
    run: Run,
) -> None:
    error, found, _ = run(CALL, TALLER, TALLEST, CALL, backend="aot_eager")
    assert error <= BOUND
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 4
    assert graphs(found) == [[2, 2], [2, 2], [0, 0], [0, 0]]


def test_patched_weights_compile_nothing_anew(run: Run) -> None:
    error, found, _ = run(CALL, {**CALL, "weights": True}, CALL, backend="aot_eager")
    assert error <= BOUND
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 3
    assert graphs(found) == [[2, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("family", "call"),
    [
        thorough("", CALL | {"batch": 2}),
        thorough("", CALL | {"mask": True, "refs": [[7, 9]], "control": 20}),
        ("flux2", CALL | {"batch": 2, "refs": [[7, 9]], "ref_method": "index"}),
        thorough("chroma", CALL | {"mask": True}),
        thorough("chroma_radiance_conv", CALL | {"height": 96, "width": 80}),
    ],
)
def test_every_kind_of_call_runs_compiled(run: Run, family: str, call: dict[str, Any]) -> None:
    error, found, _ = run(call, {**call, "seed": 1}, family=family, backend="aot_eager")
    assert error <= BOUND
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 2
    assert graphs(found) == [[2, 2], [0, 0]]


@pytest.mark.thorough  # the twin above has the same in bf16
@pytest.mark.parametrize(("gib", "is_cast"), [("auto", False), ("8", True)])
def test_weights_stored_in_fp8_run_compiled(run: Run, gib: str, is_cast: bool) -> None:
    how = {"gib": gib, "strategy": "ulysses=2,modulation=2" if is_cast else ""}
    fp8 = {"dtype": "float8_e4m3fn"}
    patched = {**CALL, "weights": True}
    error, found, _ = run(CALL, patched, CALL, options=fp8, backend="aot_eager", **how)
    assert error <= BOUND
    assert any("weights cast once" in line for line in found[-1]["residency"]) == is_cast
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 3
    assert graphs(found) == [[2, 2], [0, 0], [0, 0]]


@pytest.mark.every_version
@pytest.mark.parametrize("strategy", [SHARED, SHARDED])
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.thorough])],
)
def test_blocks_of_which_a_rank_has_a_part_run_compiled(
    run: Run, backend: str, strategy: str
) -> None:
    steps = [{**CALL, "seed": 1}, {**CALL, "seed": 2}, {**CALL, "weights": True}]
    sizes = [{**TALLER, "batch": batch} for batch in (2, 3)]
    error, found, log = run(*steps, *sizes, strategy=strategy, backend=backend)
    assert error <= BOUND
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 5
    assert graphs(found) == [[2, 2], [0, 0], [0, 0], [2, 2], [0, 0]]
    assert "run as they are" not in log


@pytest.mark.needs(*QUANTISED)
@pytest.mark.parametrize(
    "name", ["mixed-fp8", thorough("scaled-fp8"), thorough("mixed-fp8-input"), thorough("mxfp8")]
)
def test_weights_quantised_to_8_bits_of_floating_point_run_compiled(run: Run, name: str) -> None:
    error, found, log = run(CALL, {**CALL, "seed": 1}, quantised=name, backend="aot_eager")
    assert error <= BOUND
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 2
    assert graphs(found) == [[2, 2], [0, 0]]
    assert "run as they are" not in log


@pytest.mark.needs(*QUANTISED)
def test_weights_quantised_otherwise_run_as_they_are(run: Run) -> None:
    error, found, log = run(CALL, quantised="nvfp4", backend="aot_eager")
    assert error <= BOUND
    assert graphs(found) == [[0, 0]]
    assert (
        log.count("blocks of a compiled model run as they are: the model's weights are quant") == 1
    )


@pytest.mark.parametrize("strategy", ["", SHARED])
def test_single_blocks_that_are_compiled_are_the_only_ones(run: Run, strategy: str) -> None:
    parts = ["double_blocks.1", "single_blocks.0", "single_blocks.2"]
    error, found, _ = run(CALL, CALL, strategy=strategy, backend="eager", parts=parts)
    assert error <= BOUND
    assert compiled(found) == [[3, 3]] * 2
    assert graphs(found) == [[2, 2], [0, 0]]


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("patches_attention", "a node's patch runs inside of the blocks"),
        ("replaces_blocks", "a node's code runs around the blocks"),
    ],
)
def test_what_cannot_run_compiled_runs_as_it_is_and_that_is_said(
    run: Run, tree: Tree, node: str, says: str
) -> None:
    blocks = (tree.path / "comfy" / "ldm" / "flux" / "layers.py").read_text()
    if node == "patches_attention" and "attn1_patch" not in blocks:
        pytest.skip("blocks of this ComfyUI call no patches of attention")
    error, found, log = run({**CALL, "node": node}, backend="eager")
    assert error <= BOUND
    assert graphs(found) == [[0, 0]]
    assert log.count(f"blocks of a compiled model run as they are: {says}") == 1


def test_a_nodes_attention_runs_in_compiled_blocks(
    run: Run,
) -> None:
    call = {**CALL, "node": "chooses_attention"}
    error, found, _ = run(call, call, backend="eager")
    assert error <= BOUND
    assert compiled(found) == [[NUM_BLOCKS] * 2] * 2
    assert graphs(found) == [[2, 2], [0, 0]]


def test_comfyui_alone_computes_a_step_compiled_also_while_it_is_timed(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str]
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:2", XDIT_STRATEGY="auto")
    given = {"path": flux_dev(hidden=384, **SIZES), **CALL}
    (expected,) = set(stock.call("compiled:operators_compiled", calls=2, **given))
    found = ranks.call("compiled:operators_compiled", calls=12, **given)
    totals = ranks.call("forwards:status")["totals"]
    assert totals["steps_measured"] > 1
    num_alone = sum(totals[name] for name in ("steps_measured", "steps_chose_one_gpu"))
    assert sum(found) == num_alone * expected, "in the other steps the ranks compute"


@pytest.mark.newest_only
@pytest.mark.thorough  # new ranks; what a failure does is in the unit tests
def test_without_a_compiler_blocks_run_as_they_are_and_that_is_said_once(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> None:
    broken = {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:2", **STRICT, **broken)
    path, outs = flux_dev(hidden=384, **SIZES), [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    steps = {"path": path, "calls": [{**CALL, "seed": seed} for seed in range(3)]}
    stock.call("compiled:calls", out=outs[0], **steps)
    found = ranks.call("compiled:calls", out=outs[1], backend="inductor", **steps)
    assert compiled([{}, *found]) == [[0, 0]] * 3
    assert found[0]["ranks"][0]["graphs"] == found[2]["ranks"][0]["graphs"] == 1, "it is tried once"
    for expected, got in zip(*(torch.load(out) for out in outs), strict=True):
        assert ((got - expected).abs().max() / expected.abs().max()).item() <= BOUND
    said = "xDiT: blocks of a compiled model run as they are: torch did not compile 5 of 5: "
    assert ranks.log_text().count(said) == 1
