"""Workers make the weights that ComfyUI with dynamic VRAM computes with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from inside.client import Inside
from rig.trees import Tree

pytestmark = [
    pytest.mark.newest_only,
    pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled"),
]


def test_a_worker_leaves_weights_uncast_that_the_host_has_not_cast(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str]
) -> None:
    """ComfyUI with dynamic VRAM does not cast the scales of norms to ``weight_dtype``."""
    uncast = ["double_blocks.0.img_attn.norm.query_norm.weight"]
    stock = inside(tree, XDIT_STRATEGY="off")
    got = stock.call("dynamic_vram:uncast_by_a_worker", path=flux_dev(hidden=512), uncast=uncast)
    assert [name for name, dtype in got.items() if dtype == "torch.bfloat16"] == uncast
    assert {*got.values()} == {"torch.bfloat16", "torch.float8_e4m3fn"}


@pytest.mark.parametrize("stored", ["bfloat16", "float8_e4m3fn", "float32"])
def test_a_worker_patches_weights_to_the_bits_that_the_host_keeps(
    tree: Tree, inside: Callable[..., Inside], stored: str
) -> None:
    stock = inside(tree, XDIT_STRATEGY="off")
    got = stock.call("dynamic_vram:patched_weights", stored=stored)
    assert got["worker"] == [0, 0]
    assert sum(got["whole"]) > 100, "ComfyUI's way for a whole model would do as well"
