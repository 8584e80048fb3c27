"""A forward with shared modulation has the bits of the forward with whole weights.

First in a ComfyUI process for each rank, each of which computes all tokens, so that nothing but the
modulation can differ; then by the plans of one ComfyUI with its ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import BOUND, STRICT, compare
from inside.client import Inside
from rig.breadth import is_whole
from rig.trees import Tree
from test_strategies import DEV, ODD, following
from test_tensor import FP8
from test_weight_sharding import file_of, on_ranks, processes

__all__ = ["processes"]  # a fixture

MODEL = {"hidden": 384, "double": 2, "single": 3}
CASES: dict[str, dict[str, Any]] = {
    "float32": {"options": {"dtype": "float32"}},
    "bf16": {"options": {"dtype": "bfloat16"}},
    "fp8": {"options": {"dtype": "float8_e4m3fn"}},
    "bf16 with weight patches": {"options": {"dtype": "bfloat16"}, "lora": True},
    "mixed precision": {"options": {}, "mixed": True},
    "a LoRA that bypasses": {"options": {"dtype": "float32"}, "bypass": True},
}
BYPASS = ("comfy/weight_adapter/bypass.py", "class BypassForwardHook")
VALUE_BYTES = 4
"""ComfyUI computes in float32 on a CPU."""
ALWAYS = 2 * 3 + 2
"""Plans of every world, blocks asked together and one by one; and what comes after."""


@pytest.mark.parametrize("name", CASES)
def test_shared_equals_whole_bit_for_bit(
    tree: Tree,
    processes: list[Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    name: str,
) -> None:
    case = dict(CASES[name])
    if "bypass" in case and not tree.has(BYPASS):
        pytest.skip("no bypass hooks")
    path = file_of(case, processes, flux_dev(**MODEL), tmp_path)
    for world_size in (2, 3, 4) if is_whole() else (3, 4):
        store = tmp_path / f"store-{world_size}"
        results = on_ranks(processes, "modulation:compare", world_size, store, path=path, **case)
        for rank, result in enumerate(results):
            assert all(result["equal"].values()), (rank, result)
            assert len(result["equal"]) == ALWAYS + 2 * (world_size == 4)
            assert min(result["size"]) > 0.1


@pytest.mark.newest_only
def test_a_rank_holds_its_part_of_the_modulation_and_sends_its_outputs_once(
    processes: list[Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    hidden, double, single = 512, 4, 8
    path = flux_dev(hidden=hidden, double=double, single=single)
    for world_size in (2, 4):
        results = on_ranks(
            processes, "modulation:compare", world_size, tmp_path / f"store-{world_size}",
            path=path, options={"dtype": "bfloat16"},
        )  # fmt: skip
        outputs = (12 * double + 3 * single) * hidden
        for result in results:
            record_property(f"bytes on {world_size} ranks", result)
            saved = result["modulation"] * (world_size - 1) // world_size
            assert result["held"] == result["whole"] - saved
            assert result["sent"] == VALUE_BYTES * outputs // world_size * (world_size - 1)


CALLS: dict[str, dict[str, Any]] = {
    **DEV,
    "batch 4": ODD | {"batch": 4, "refs": [[9, 9]]},
    "float32": ODD | {"options": {"dtype": "float32"}},
    "fp8": ODD | FP8,
    "weight patches": ODD | {"patches_weights": True},
    "fp8, weight patches": ODD | FP8 | {"patches_weights": True},
}


@pytest.mark.group("4")
def test_plans_with_shared_modulation_have_the_bits_of_those_without(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:4", **STRICT)
    path = flux_dev(hidden=512, double=1, single=1)
    for plan, names in {
        "ulysses=4": list(CALLS),
        "batch=2,ulysses=2": ["batch 4"],
        "batch=4": ["batch 4"],
        "ulysses=2,ring=2": ["references"],
    }.items():
        for name in names if is_whole() else names[:1] + names[-3:]:
            with following(ranks, plan):
                error, _, whole = compare(stock, ranks, path, tmp_path, **CALLS[name])
                expected = torch.load(tmp_path / "ranks.pt")
            with following(ranks, f"{plan},modulation=4"):
                _, before, after = compare(stock, ranks, path, tmp_path, **CALLS[name])
                assert torch.equal(torch.load(tmp_path / "ranks.pt"), expected), (plan, name)
            record_property(f"{tree.version} {plan}, {name}", error)
            assert error <= BOUND, (plan, name)
            assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
            held, all_of_it = (
                [rank["weight_bytes"] for rank in status["ranks"]] for status in (after, whole)
            )
            assert max(held) < 0.82 * min(all_of_it), "a quarter, and three quarters of it less"
