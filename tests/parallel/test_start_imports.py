"""What a rank has imported once it has computed: torch, ComfyUI, and of ours what it needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from inside.client import Inside
from rig.faults import Orders
from rig.trees import Tree

LARGE = {"xfuser", "diffusers", "transformers", "yunchang"}
COMFYUI_ALONE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import comfy.options
comfy.options.enable_args_parsing()
import comfy.cli_args, comfy.model_management, comfy.sd
print("\\n".join(sys.modules))
"""


@pytest.mark.group("2")
def test_a_rank_has_of_the_large_packages_only_what_comfyui_itself_imports(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    orders: Orders,
    tmp_path: Path,
) -> None:
    ranks = inside(tree, XDIT_GPUS="cpu:2", XDIT_STRATEGY="ulysses", XDIT_STRICT="1")
    for rank in range(2):
        (orders.path / f"after.{rank}").write_text("tell modules")
    case = {"height": 16, "width": 12, "batch": 1, "text_tokens": 24}
    before = ranks.call("forwards:status")["totals"]["steps_parallel"]
    status = ranks.call("forwards:forward", path=flux_dev(hidden=256), out=f"{tmp_path}/x", **case)
    assert status["totals"]["steps_parallel"] == before + 1
    command = [sys.executable, "-c", COMFYUI_ALONE, str(tree.path), "--cpu"]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    of_comfyui = LARGE & {*alone.stdout.splitlines()}
    for rank in range(2):
        modules = {*(orders.path / f"modules.{rank}").read_text().splitlines()}
        assert "comfy.sd" in modules
        assert "comfy_xdit_patch.worker.attention.ulysses" in modules
        assert LARGE & modules == of_comfyui == {"transformers"}
