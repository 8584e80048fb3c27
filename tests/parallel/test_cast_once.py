"""Weights that ComfyUI casts for each call are cast once where cards have room: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import BOUND, STRICT, compare
from inside.client import Inside
from rig.trees import Tree
from safetensors import safe_open
from test_strategies import ODD
from test_tensor import FP8

MODEL = {"hidden": 512, "double": 2, "single": 2}
ROOM, LITTLE = "2.2", "1.98"
"""GiB of a card; 1.91 of them are contexts, a communicator and the reserve, cast weights 0.09."""
CALLS: dict[str, dict[str, Any]] = {
    "fp8": ODD | FP8,
    "weight patches": ODD | FP8 | {"patches_weights": True},
    "fp8 again": ODD | FP8,
}
COMPUTE_BYTES = 4
"""ComfyUI computes in float32 on a CPU."""
TEXT = "weights cast once"


def test_only_plain_weights_of_linears_that_cast_and_do_no_more(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    found = inside(tree, XDIT_STRATEGY="off").call("casts:which")
    assert [name for name, can_be in found.items() if can_be] == ["cast for each call"]
    assert len(found) >= 8


@pytest.mark.group("2")
def test_cast_weights_give_the_bits_of_stored_ones_and_lie_where_they_fit(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    path = flux_dev(**MODEL)
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    for gib in (ROOM, LITTLE):
        named = {**STRICT, "XDIT_STRATEGY": "ulysses=2,modulation=2"}
        ranks = inside(tree, XDIT_GPUS="cpu:2", XDIT_GPU_MEMORY=gib, **named)
        of_gib = outputs[gib] = {}
        for name, case in CALLS.items():
            error, before, after = compare(stock, ranks, path, tmp_path, **case)
            record_property(f"{tree.version} {gib} GiB, {name}", error)
            assert error <= BOUND, (gib, name)
            assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
            of_gib[name] = torch.load(tmp_path / "ranks.pt")
            assert (TEXT in after["residency"][0]) == (gib == ROOM)
            held = {rank["weight_bytes"] for rank in after["ranks"]}
            assert held == {bytes_of(path, is_cast=gib == ROOM)}, name
    assert all(torch.equal(outputs[ROOM][name], outputs[LITTLE][name]) for name in CALLS)
    assert torch.equal(outputs[ROOM]["fp8"], outputs[ROOM]["fp8 again"])
    assert not torch.equal(outputs[ROOM]["fp8"], outputs[ROOM]["weight patches"])


def bytes_of(path: str, *, is_cast: bool) -> int:
    """What each of two ranks holds: half of the modulation, and scales of norms as stored."""
    total = 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            number = file.get_tensor(name).numel()
            if is_cast and ".norm." not in name:
                number *= COMPUTE_BYTES
            total += number // 2 if "_mod.lin." in name or ".modulation.lin." in name else number
    return total
