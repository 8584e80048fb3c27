"""ComfyUI's own unit tests of models, patchers, quantisation and execution: with us as without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rig.own_tests import outcomes
from rig.trees import Tree

PLUGINS = Path(__file__).parent / "plugins"
FOLDERS = ("comfy_test", "comfy_quant", "comfy_extras_test", "execution_test")
DEADLINE_S = 300


def start(tree: Tree, report: Path, **env: str) -> subprocess.Popen[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("XDIT_")}
    variables |= {
        "PYTHONPATH": f"{tree.path}:{PLUGINS}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    folders = [
        f"tests-unit/{name}" for name in FOLDERS if (tree.path / "tests-unit" / name).is_dir()
    ]
    command = [sys.executable, "-m", "pytest", *folders, "-p", "comfyui_on_cpu", "-q"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
    return subprocess.Popen(
        command,
        cwd=tree.path,
        env=variables | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.thorough
def test_comfyuis_own_unit_tests_give_the_same_result(tree: Tree, tmp_path: Path) -> None:
    reports = {name: tmp_path / f"{name}.xml" for name in ("stock", "active")}
    running = {
        "stock": start(tree, reports["stock"], XDIT_STRATEGY="off"),
        "active": start(tree, reports["active"], XDIT_GPUS="cpu:2"),
    }
    output = {name: process.communicate(timeout=DEADLINE_S)[0] for name, process in running.items()}
    assert "xdit active: False" in output["stock"]
    assert "xdit active: True" in output["active"]
    stock = outcomes(reports["stock"])
    assert outcomes(reports["active"]) == stock
    assert sum(kind == "passed" for kind in stock.values()) > 20
