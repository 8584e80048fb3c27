"""Forwards under every exact plan equal stock's, and move the bytes that the formulas say.

The strategy is changed in a running ComfyUI process: starting one with its ranks takes longer than
all cases of a plan. That the setting itself is obeyed is in tests/e2e/test_named_strategies.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from exactness import BOUND, STRICT, compare
from inside.client import Inside
from rig.breadth import is_whole, sampled
from rig.trees import Tree

from comfy_xdit_patch.planning.plan import ParallelPlan

ODD = {"height": 9, "width": 13, "batch": 1, "text_tokens": 77}
# Even in 4: 24 text tokens and 48 of the image, 6 heads in 2.
EVEN = {"height": 16, "width": 12, "batch": 1, "text_tokens": 24}
FLOAT32 = {"options": {"dtype": "float32"}}
DEV = {
    "odd": ODD,
    "references": ODD | {"refs": [[9, 9], [16, 8]]},
    "ControlNet residuals": ODD | {"control": 20, "refs": [[9, 9]]},
    "attention mask": ODD | {"mask": True},
    "attention mask, references, batch 2": ODD | {"mask": True, "refs": [[9, 9]], "batch": 2},
    "a patch after attention": ODD | {"refs": [[7, 6]], "patches_attention": True},
    "blocks in ComfyUI's process": ODD | {"refs": [[7, 6]], "replaces_blocks": True},
}
FAMILY = {
    "flux2": ODD | {"refs": [[7, 9]], "ref_method": "index"},
    "chroma": ODD | {"batch": 2, "control": 35, "mask": True},
    "chroma_radiance_conv": ODD | {"height": 96, "width": 80},
}
PLANS_OF_4 = {
    ParallelPlan(ulysses=2, ring=2): [*DEV],
    ParallelPlan(ring=4): ["attention mask, references, batch 2"],
    # A node's code, and one mask for all rows, leave the batch whole.
    ParallelPlan(batch=2, ring=2): ["references"],
}


@contextmanager
def following(ranks: Inside, strategy: str) -> Iterator[None]:
    ranks.call("steering:use_strategy", text=strategy)
    try:
        yield
    finally:
        ranks.call("steering:use_strategy", text="auto")


@pytest.mark.group("3")
def test_a_ring_equals_stock_in_every_shape(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    paths = {name: flux_dev(hidden=768, double=1, single=1) for name in DEV}
    for family in FAMILY:
        paths[family] = str(tmp_path / f"{family}.safetensors")
        sizes = {"hidden": 512, "double": 1, "single": 1, "context": 64}
        stock.call("families:write_model", path=paths[family], family=family, **sizes)
    with following(ranks, "ring"):
        for name, case in sampled({**DEV, **FAMILY}, every=2).items():
            error, before, after = compare(stock, ranks, paths[name], tmp_path, **case)
            record_property(f"{tree.version} ring=3, {name}", error)
            assert error <= BOUND, name
            assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
            assert after["totals"]["bytes_between_ranks"] > before["totals"]["bytes_between_ranks"]


@pytest.mark.group("3")
@pytest.mark.newest_only
def test_an_attention_function_of_a_nodes_is_never_left_out_for_a_ring(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> None:
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    call = {
        "path": flux_dev(hidden=768, double=1, single=1),
        "out": str(tmp_path / "out.pt"),
        "chooses_attention": True,
        **ODD,
    }
    with (
        following(ranks, "ring"),
        pytest.raises(RuntimeError, match="a node chose the attention function"),
    ):
        ranks.call("forwards:forward", **call)
    before = ranks.call("forwards:status")
    assert (
        ranks.call("forwards:forward", **call)["totals"]["steps_parallel"]
        == before["totals"]["steps_parallel"] + 1
    )


@pytest.mark.group("3")
@pytest.mark.newest_only
def test_shards_of_weights_by_name(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:3", **STRICT)
    path = flux_dev(hidden=768, double=1, single=1)
    sizes = {}
    for strategy in ("ulysses", "ulysses=3,fsdp=3"):
        with following(ranks, strategy):
            error, _, after = compare(stock, ranks, path, tmp_path, **ODD, **FLOAT32)
            assert error <= BOUND
            sizes[strategy] = [rank["weight_bytes"] for rank in after["ranks"]]
    whole, shards = sizes.values()
    assert all(part < 0.7 * all_of_it for part, all_of_it in zip(shards, whole, strict=True))


@pytest.mark.group("4")
@pytest.mark.newest_only
def test_hybrid_plans_equal_stock_and_move_the_bytes_of_the_formulas(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    ranks = inside(tree, XDIT_GPUS="cpu:4", **STRICT)
    path = flux_dev(hidden=768, double=1, single=1)
    for plan in PLANS_OF_4:
        with following(ranks, plan.name):
            names = PLANS_OF_4[plan]
            for name in names if is_whole() else names[::3]:
                case = DEV[name] | {"batch": max(plan.batch, DEV[name]["batch"])}
                error, before, after = compare(stock, ranks, path, tmp_path, **case)
                record_property(f"{plan.name}, {name}", error)
                assert error <= BOUND, (plan.name, name)
                assert after["totals"]["steps_parallel"] == before["totals"]["steps_parallel"] + 1
            even = EVEN | {"batch": plan.batch}
            _, before, after = compare(stock, ranks, path, tmp_path, **even, **FLOAT32)
            moved = after["totals"]["bytes_between_ranks"] - before["totals"]["bytes_between_ranks"]
            record_property(f"{plan.name}, bytes", moved)
            assert moved == expected_bytes(plan, hidden=768, num_blocks=2)


def expected_bytes(plan: ParallelPlan, *, hidden: int, num_blocks: int) -> int:
    """What all ranks send in one forward of ``EVEN``, in float32."""
    text, image = 24, 48
    u, r, n = plan.ulysses, plan.ring, plan.sequence
    shard = (text + image) * hidden * 4 / n
    attention = num_blocks * shard * (4 * (u - 1) / u + 2 * (r - 1))
    output = image / n * 64 * 4 * (n - 1)  # gathered: 2 x 2 latent pixels of 16 channels a token
    total: float = plan.world_size * (attention + output)
    assert total.is_integer()
    return int(total)
