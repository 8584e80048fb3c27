"""ComfyUI's own copy of a model that a worker on the same GPU runs stays off that GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from inside.client import Inside
from rig.trees import Tree

RANKS = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": "400"}
FELL_BACK = {"parallel": 0, "fell_back": {"ComfyUI's own MultiGPU split is active": 1}}


def test_a_held_back_model_is_whole_and_comes_back_when_comfyui_needs_it(
    tree: Tree, inside: Callable[..., Inside], flux_dev: Callable[..., str], tmp_path: Path
) -> None:
    stock, ranks = inside(tree, XDIT_STRATEGY="off"), inside(tree, **RANKS)
    path = flux_dev(hidden=512)
    files = {name: str(tmp_path / f"{name}.pt") for name in ("stock", "ranks", "alone")}
    stock.call("holding:lora_call", path=path, out=files["stock"])
    got = ranks.call("holding:held_back_calls", path=path, out=files["ranks"], alone=files["alone"])
    assert got["parallel"] == {"parallel": 1, "fell_back": {}}
    assert got["held back"], "ComfyUI's copy was loaded"
    assert got["baked"] == 0, "ComfyUI patched weights that it does not use"
    assert got["alone"] == FELL_BACK
    assert not got["held back after that"], "ComfyUI runs it alone and needs it on the device"
    expected, *others = (torch.load(files[name]) for name in ("stock", "ranks", "alone"))
    for out in others:
        assert ((out - expected).abs().max() / expected.abs().max()).item() <= 1e-5
