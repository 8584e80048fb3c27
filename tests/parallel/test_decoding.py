"""Pictures that ranks decode together are those that ComfyUI decodes alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import BOUND, STRICT
from inside.client import Inside
from rig.breadth import is_whole
from rig.status_schema import decodes
from rig.trees import Tree
from test_weight_sharding import on_ranks, processes

from comfy_xdit_patch.hardware.usage import process_ticks

__all__ = ["processes"]  # a fixture

UNEVEN = [[1, 12, 7], [2, 9, 10], [1, 5, 16]]
ATTENTION = ("pytorch_attention", "normal_attention")
BF16_BOUND = 0.06
"""Of the largest value: a bf16 number has eight bits, and a decoder has forty layers."""
LARGE = [1, 128, 128]
"""Batch, height and width of the latent of 1024 x 1024 px."""


@pytest.mark.parametrize("attention", ATTENTION)
def test_lines_of_ranks_are_those_of_the_whole_picture(
    tree: Tree,
    processes: list[Inside],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    attention: str,
) -> None:
    for world_size in (2, 3, 4):
        for dtype, bound in {"float32": BOUND, "bfloat16": BF16_BOUND}.items():
            store = tmp_path / f"store-{world_size}-{dtype}"
            results = on_ranks(
                processes, "decoding:lines", world_size, store,
                attention=attention, dtype=dtype, sizes=UNEVEN,
            )  # fmt: skip
            for result in (one for of_rank in results for one in of_rank):
                record_property(f"{tree.version}, {world_size} ranks, {dtype}", result)
                assert result["spread"] > 0.1, "a flat picture proves nothing"
                assert result["error"] <= bound * result["size"]
                assert result["sent"] > 0


def decoded(
    stock: Inside, ranks: Inside, tmp_path: Path, **case: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Decode in both processes; return both pictures and what the ranks said."""
    out = {name: str(tmp_path / f"{name}.pt") for name in ("stock", "ranks")}
    stock.call("decoding:decode", path="", out=out["stock"], **case)
    ranks.call("decoding:start")
    status = ranks.call("decoding:decode", path="", out=out["ranks"], **case)
    return torch.load(out["stock"]), torch.load(out["ranks"]), status


CASES: dict[str, dict[str, Any]] = {
    "1024 x 1024 px": {"size": LARGE},
    "bf16": {"size": [1, 130, 127], "dtype": "bfloat16"},
    "FLUX.2's, a batch": {"size": [2, 130, 128], "z": 32},
}


@pytest.mark.group("2")
@pytest.mark.parametrize("name", CASES)
def test_large_pictures_are_decoded_by_all_ranks(
    tree: Tree,
    inside: Callable[..., Inside],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    if not is_whole() and name != "FLUX.2's, a batch":
        pytest.skip("one of each mechanism")
    stock, ranks = inside(tree, XDIT_STRATEGY="off"), inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    before = decodes(ranks.call("forwards:status"))
    expected, got, after = decoded(stock, ranks, tmp_path, **CASES[name])
    error = (got - expected).abs().max().item()
    record_property(f"{tree.version} {name}", {"error": error, **decodes(after)})
    assert expected.std() > 0.1
    assert error <= (BF16_BOUND if "dtype" in CASES[name] else BOUND)
    num_decodes = decodes(after)["parallel"] - before["parallel"]
    assert decodes(after)["alone"] == before["alone"], after["last_error"]
    assert num_decodes == 1, after["state"]


TILED: dict[str, dict[str, Any]] = {
    "by the node": {"size": LARGE, "tile": 64},
    "FLUX.2's, bf16": {"size": [1, 130, 128], "z": 32, "dtype": "bfloat16", "tile": 24},
    "for want of memory": {"size": LARGE, "patch": "no memory"},
}


@pytest.mark.group("2")
@pytest.mark.every_version
@pytest.mark.parametrize("name", TILED)
def test_tiles_of_large_pictures_are_decoded_by_all_ranks_to_the_same_bits(
    tree: Tree, inside: Callable[..., Inside], tmp_path: Path, name: str
) -> None:
    if not is_whole() and name != "FLUX.2's, bf16":
        pytest.skip("one of each mechanism")
    stock, ranks = inside(tree, XDIT_STRATEGY="off"), inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    before = ranks.call("forwards:status")
    expected, got, after = decoded(stock, ranks, tmp_path, **TILED[name])
    assert expected.std() > 0.1
    assert torch.equal(got, expected)
    assert decodes(after)["parallel"] == decodes(before)["parallel"] + 1, after["last_error"]
    assert decodes(after)["alone"] == decodes(before)["alone"]
    sent = [s["totals"]["bytes_from_workers"] for s in (before, after)]
    assert sent[1] - sent[0] > expected.numel() * 3  # each pixel is in a tile of three passes
    values, totals = zip(*after["progress"], strict=True)
    assert values[-1] == totals[-1]
    assert list(values) == sorted(set(values)), "each tile once"


@pytest.mark.group("2")
@pytest.mark.newest_only
def test_tiles_that_a_node_decodes_in_another_way_are_left_to_comfyui(
    tree: Tree, inside: Callable[..., Inside], tmp_path: Path
) -> None:
    stock, ranks = inside(tree, XDIT_STRATEGY="off"), inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    before = decodes(ranks.call("forwards:status"))
    case = {"size": LARGE, "tile": 64, "patch": "another decoder"}
    expected, got, after = decoded(stock, ranks, tmp_path, **case)
    assert torch.equal(got, expected)
    assert decodes(after)["parallel"] == before["parallel"]
    new = decodes(after)["alone"].keys() - before["alone"].keys()
    assert new == {"a node decodes tiles in a way of its own"}


PATCHES = {
    "weights": "a node patched the VAE",
    "forward": "a node replaced the forward of conv_out by ",
    "hook": "a forward hook is set on mid.block_1: ",
    "attention": "the VAE's attention is not ComfyUI's: ",
    "attribute": "a node set norm_out.eps of the VAE",
}


@pytest.mark.group("2")
@pytest.mark.newest_only
def test_a_vae_that_a_node_changed_is_left_to_comfyui(
    tree: Tree, inside: Callable[..., Inside], tmp_path: Path
) -> None:
    stock, ranks = inside(tree, XDIT_STRATEGY="off"), inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    for patch in PATCHES if is_whole() else ("attribute", "attention"):
        before = decodes(ranks.call("forwards:status"))
        case = {"size": LARGE, "patch": patch}
        expected, got, after = decoded(stock, ranks, tmp_path, **case)
        assert torch.equal(got, expected), patch
        assert decodes(after)["parallel"] == before["parallel"]
        new = decodes(after)["alone"].keys() - before["alone"].keys()
        assert len(new) == 1
        assert new.pop().startswith(PATCHES[patch])


@pytest.mark.group("2")
@pytest.mark.newest_only
def test_a_weight_that_was_edited_in_place_is_carried_again(
    tree: Tree, inside: Callable[..., Inside], tmp_path: Path
) -> None:
    ranks = inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    out, case = str(tmp_path / "ranks.pt"), {"path": "", "size": LARGE}
    ranks.call("decoding:start")
    ranks.call("decoding:decode", out=out, **case)
    before = torch.load(out)
    ranks.call("decoding:decode", out=out, patch="in place", **case)
    after = torch.load(out)
    inner = (before > 0.01) & (after > 0.01) & (before < 0.7) & (after < 0.99)
    assert inner.any()
    assert torch.allclose((after - before)[inner], torch.tensor(0.25), atol=1e-4)


@pytest.mark.group("2")
@pytest.mark.newest_only
@pytest.mark.parametrize(
    "tile", [0, pytest.param(64, marks=pytest.mark.thorough)], ids=["whole", "in tiles"]
)
def test_a_rank_lost_while_it_decodes_costs_no_picture(
    tree: Tree, inside: Callable[..., Inside], tmp_path: Path, tile: int
) -> None:
    stock, ranks = inside(tree, XDIT_STRATEGY="off"), inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    out = {name: str(tmp_path / f"{name}.pt") for name in ("stock", "ranks")}
    dtype = "bfloat16" if tile else "float32"  # Tiles take four times as long.
    case = {"path": "", "size": LARGE, "tile": tile, "dtype": dtype}
    stock.call("decoding:decode", out=out["stock"], **case)
    ranks.call("decoding:start")
    before = ranks.call("decoding:decode", out=out["ranks"], **case)
    victim = before["ranks"][1]["pid"]
    ranks.start_call("decoding:decode", out=out["ranks"], **case)
    busy_until = cpu_seconds(victim) + 0.5
    end = time.monotonic() + 60
    while cpu_seconds(victim) < busy_until:
        assert time.monotonic() < end, "the rank computes nothing"
        time.sleep(0.02)
    os.kill(victim, signal.SIGKILL)
    after = ranks.finish_call()
    assert torch.equal(torch.load(out["ranks"]), torch.load(out["stock"]))
    assert decodes(after)["parallel"] == decodes(before)["parallel"]
    assert decodes(after)["alone"] == {
        **decodes(before)["alone"],
        "a worker was lost": decodes(before)["alone"].get("a worker was lost", 0) + 1,
    }


def cpu_seconds(pid: int) -> float:
    return process_ticks(pid) / os.sysconf("SC_CLK_TCK")


@pytest.mark.group("2")
@pytest.mark.newest_only
@pytest.mark.parametrize("tile", [0, 64], ids=["whole", "in tiles"])
def test_the_user_can_cancel_while_ranks_decode(
    tree: Tree, inside: Callable[..., Inside], tmp_path: Path, tile: int
) -> None:
    ranks = inside(tree, XDIT_GPUS="cpu:2", **STRICT)
    ranks.call("decoding:start")
    case = {"out": str(tmp_path / "ranks.pt"), "size": LARGE, "tile": tile, "dtype": "bfloat16"}
    assert ranks.call("decoding:interrupted", **case) == "InterruptProcessingException"
    before = decodes(ranks.call("forwards:status"))
    after = ranks.call("decoding:decode", path="", **case)
    assert decodes(after)["parallel"] == before["parallel"] + 1


@pytest.mark.group("2")
@pytest.mark.newest_only
def test_small_pictures_and_those_of_who_wants_none_are_comfyuis_own(
    tree: Tree, inside: Callable[..., Inside], tmp_path: Path
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    for size, settings in (([1, 127, 128], {}), (LARGE, {"XDIT_VAE": "off"})):
        ranks = inside(tree, XDIT_GPUS="cpu:2", **STRICT, **settings)
        before = decodes(ranks.call("forwards:status"))
        expected, got, after = decoded(stock, ranks, tmp_path, size=size)
        assert torch.equal(got, expected)
        assert decodes(after) == before
