"""Blocks cut by heads and columns: forwards equal stock's, and move the bytes of the formula.

The strategy is changed in a running ComfyUI process, as in ``test_strategies.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from exactness import BOUND, STRICT, compare
from inside.client import Inside
from rig.breadth import is_whole, sampled
from rig.feature_packs import ATTENTION_PATCHES
from rig.trees import Tree
from safetensors.torch import load_file
from test_strategies import EVEN, FLOAT32, ODD, following

from comfy_xdit_patch.planning.cost.rank_time import modulation_bytes, tensor_bytes
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.planner import named_plan
from comfy_xdit_patch.planning.strategy import parse_strategy

FP8 = {"options": {"dtype": "float8_e4m3fn"}}
DEV = {
    "odd": ODD,
    "references": ODD | {"refs": [[9, 9], [16, 8]]},
    "ControlNet residuals": ODD | {"control": 20, "refs": [[9, 9]]},
    "attention mask, references, batch 2": ODD | {"mask": True, "refs": [[9, 9]], "batch": 2},
    "an attention function of a node's": ODD | {"chooses_attention": True},
    "weight patches": ODD | {"patches_weights": True},
    "fp8": ODD | FP8,
    "fp8, weight patches": ODD | FP8 | {"patches_weights": True},
    "fp8, fast": ODD | {"options": {"dtype": "float8_e4m3fn", "fp8_optimizations": True}},
}
FAMILY = {
    "schnell": ODD,
    "ovis": ODD,
    "flux2": ODD | {"batch": 2, "refs": [[7, 9]], "ref_method": "index"},
    "chroma": ODD | {"batch": 2, "control": 35, "mask": True},
    "chroma_radiance_conv": ODD | {"height": 96, "width": 80},
}


MASKED = "attention mask, references, batch 2"
PLANS_OF_4 = {
    "ulysses=2,tensor=2": ["odd", "references", "ControlNet residuals", "fp8", MASKED],
    "batch=2,tensor=2": ["references", "weight patches"],
    "ring=2,tensor=2": ["odd", MASKED],
    "tensor=4": ["odd", "references"],
}


@pytest.mark.group("3")
def test_cut_blocks_equal_stock_in_every_shape(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    # 4 heads and 2048 columns on 3 ranks: 2, 1, 1 and 704, 704, 640.
    paths = {name: flux_dev(hidden=512, double=1, single=1) for name in DEV}
    paths |= write_family(tree, stock, tmp_path)
    with following(ranks, "tensor"):
        for name, case in sampled({**DEV, **FAMILY}, every=2).items():
            if name not in paths:
                continue
            error, before, after = compare(stock, ranks, paths[name], tmp_path, **case)
            record_property(f"{tree.version} tensor=3, {name}", error)
            assert error <= BOUND, name
            assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
            assert after["totals"]["bytes_between_ranks"] > before["totals"]["bytes_between_ranks"]


@pytest.mark.group("4")
@pytest.mark.newest_only
def test_plans_with_cut_blocks_equal_stock_and_move_the_bytes_of_the_formulas(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:4", **STRICT)
    path = flux_dev(hidden=512, double=1, single=1)
    family = write_family(tree, stock, tmp_path)
    for text, names in PLANS_OF_4.items():
        plan = plan_of_4(text)
        with following(ranks, text):
            for name in names if is_whole() else names[-1:]:
                case = DEV[name] | {"batch": max(plan.batch, DEV[name]["batch"])}
                error, before, after = compare(stock, ranks, path, tmp_path, **case)
                record_property(f"{text}, {name}", error)
                assert error <= BOUND, (text, name)
                assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
            even = EVEN | {"batch": plan.batch}
            _, before, after = compare(stock, ranks, path, tmp_path, **even, **FLOAT32)
            moved = after["totals"]["bytes_between_ranks"] - before["totals"]["bytes_between_ranks"]
            record_property(f"{text}, bytes", moved)
            assert moved == expected_bytes(plan, hidden=512)
    with following(ranks, "ulysses=2,tensor=2"):
        for name, path in sampled(family, every=3).items():
            error, before, after = compare(stock, ranks, path, tmp_path, **FAMILY[name])
            record_property(f"ulysses=2,tensor=2, {name}", error)
            assert error <= BOUND, name
            assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1


@pytest.mark.group("2")
@pytest.mark.newest_only
def test_two_ranks_hold_half_of_each_block_and_refuse_what_looks_at_all_heads(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    path, mixed = flux_dev(hidden=768, double=1, single=1), str(tmp_path / "mixed.safetensors")
    stock.call("sharding:write_mixed_precision", source=path, path=mixed)
    _, _, whole = compare(stock, ranks, path, tmp_path, **ODD)
    with following(ranks, "tensor"):
        for name, case in sampled({**DEV, "mixed precision": ODD}, every=3).items():
            of_case = mixed if name == "mixed precision" else path
            error, before, after = compare(stock, ranks, of_case, tmp_path, **case)
            record_property(f"tensor=2, {name}", error)
            assert error <= BOUND, name
            assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
            if name == "odd":
                held = [rank["weight_bytes"] for rank in after["ranks"]]
                record_property("bytes held", (held, whole["ranks"][0]["weight_bytes"]))
                in_blocks = part_in_blocks(path)
                for num_bytes, rank in zip(held, whole["ranks"], strict=True):
                    expected = (1 - in_blocks / 2) * rank["weight_bytes"]
                    # But for norms of q and k, and biases that one rank adds for all.
                    assert num_bytes == pytest.approx(expected, rel=1e-3)
        for case, reason in REFUSED.items():
            if case == "patches_attention" and not tree.has(ATTENTION_PATCHES):
                continue
            with pytest.raises(RuntimeError, match=reason):
                compare(stock, ranks, path, tmp_path, **ODD | {case: True})
    # The same model whole again.
    error, before, after = compare(stock, ranks, path, tmp_path, **ODD)
    assert error <= BOUND
    assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1


REFUSED = {
    "patches_attention": "a node's patch may look at all of them",
    "replaces_blocks": "they cannot be run one by one: a node replaces blocks",
}


def part_in_blocks(path: str) -> float:
    """How much of a file's weights is in blocks."""
    sizes = {name: tensor.numel() for name, tensor in load_file(path).items()}
    return sum(n for name, n in sizes.items() if "_blocks." in name) / sum(sizes.values())


def write_family(tree: Tree, stock: Inside, folder: Path) -> dict[str, str]:
    """Write every model of the family that this ComfyUI knows; return their paths."""
    knows_ovis = "yak_mlp" in (tree.path / "comfy/ldm/flux/layers.py").read_text()
    paths = {}
    for name in FAMILY:
        if name == "ovis" and not knows_ovis:
            continue
        paths[name] = str(folder / f"{name}.safetensors")
        sizes = {"hidden": 512, "double": 1, "single": 1, "context": 64}
        stock.call("families:write_model", path=paths[name], family=name, **sizes)
    return paths


def plan_of_4(text: str) -> ParallelPlan:
    return named_plan(parse_strategy(text), 4)


def expected_bytes(plan: ParallelPlan, *, hidden: int) -> int:
    """What all ranks send in one forward of ``EVEN``, in float32; a double and a single block."""
    text, image = 24, 48
    t, u, r, n = plan.tensor, plan.ulysses, plan.ring, plan.sequence
    local = (text + image) * hidden / n
    sums = tensor_bytes(local, t, num_gathers=2 + 1, value_bytes=4)
    modulation = modulation_bytes((12 + 3) * hidden, t, value_bytes=4)
    # Each rank of a tensor group sends its own heads.
    attention = 2 * local / t * 4 * (4 * (u - 1) / u + 2 * (r - 1))
    output = image / n * 64 * 4 * (n - 1)
    total: float = plan.world_size * (sums + modulation + attention + output)
    assert total.is_integer()
    return int(total)
