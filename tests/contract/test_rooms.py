"""Whose memory a worker's load takes: never that of the model which is being sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from inside.client import Inside
from rig.trees import Tree

pytestmark = pytest.mark.every_version

NODES, OWN = "the node's", "ComfyUI's own"
KEPT, TAKEN = [True, NODES], [False, OWN]
MANY = 1 << 40


@pytest.mark.parametrize("needed", [MANY, None], ids=["what it needs", "all of it"])
def test_only_models_that_nobody_uses_make_room_for_a_worker(
    tree: Tree, inside: Callable[..., Inside], needed: int | None
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    got = stock.call("rooms:made_room", needed_bytes=needed, free_bytes=10)
    assert got == {"sampled": KEPT, "guest": KEPT, "idle": TAKEN}


def test_nothing_makes_room_for_a_worker_that_fits(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    """The whole model would not fit, and the worker takes less than that."""
    stock = inside(tree, XDIT_STRATEGY="off")
    got = stock.call("rooms:made_room", needed_bytes=20, free_bytes=30)
    assert got == {"sampled": KEPT, "guest": KEPT, "idle": KEPT}


@pytest.mark.parametrize("loader", ["checkpoint", "diffusion model"])
def test_a_workers_load_leaves_weights_in_cpu_memory_whatever_comfyui_finds_better(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], loader: str
) -> None:
    path = Path(flux_dev(hidden=512))
    if loader == "checkpoint":
        path = path.parents[1] / "checkpoints" / "flux1-dev-fp8.safetensors"
    stock = inside(tree, XDIT_STRATEGY="off")
    got = stock.call("rooms:loaded_by_a_worker", path=str(path), loader=loader)
    assert got == {"places": ["cpu"], "offload": "cpu", "loads": 0, "put back": True}


def test_a_worker_loads_in_the_dtypes_that_comfyui_chose_for_the_hosts_card(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str]
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    got = stock.call("rooms:loaded_for_another_card", path=flux_dev(hidden=512))
    assert got == {
        "weights": ["torch.float8_e4m3fn"],
        "compute": "torch.bfloat16",
        "put back": True,
    }


def test_a_weight_that_is_on_a_device_too_early_is_named(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    error = inside(tree, XDIT_STRATEGY="off").call("rooms:misplaced")
    assert error == "a file: ComfyUI loaded img_in.weight onto cuda:0 by itself."
