"""ComfyUI's own tests of a running server give the same results with us as without.

They start four servers each way and take minutes: ``COMFYUI_EXECUTION=1`` runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.own_tests import outcomes
from rig.server import FRONT_END, free_port
from rig.trees import Tree

DEADLINE_S = 1800

Record = Callable[[str, object], None]


def make_web_page(folder: Path) -> Path:
    """Put a page in the place of ComfyUI's own, a package without which no server starts."""
    static = folder / "comfyui_frontend_package" / "static"
    static.mkdir(parents=True)
    (static.parent / "__init__.py").touch()
    (static / "index.html").write_text(FRONT_END)
    return folder


def have_patience(tests: Path) -> None:
    """Have ComfyUI's tests wait two minutes for their servers, not 20 seconds."""
    for path in tests.glob("*.py"):
        path.write_text(path.read_text().replace("n_tries = 5", "n_tries = 30"))


def run(tree: Path, report: Path, **env: str) -> str:
    """Run the tests in a copy of the tree, which their servers write to; return the output."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("XDIT_")}
    # The tests start "python", and their servers have no option for threads.
    path = f"{Path(sys.executable).parent}:{variables['PATH']}"
    variables |= {"PATH": path, "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = str(make_web_page(report.with_suffix("")))
    command = [sys.executable, "-m", "pytest", "tests/execution", "-q", "--skip-timing-checks"]
    command += ["--port", str(free_port()), "--output_dir", str(tree / "output")]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
    done = subprocess.run(
        command,
        cwd=tree,
        env=variables | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.stdout


@pytest.mark.skipif("COMFYUI_EXECUTION" not in os.environ, reason="minutes: COMFYUI_EXECUTION=1")
def test_comfyuis_tests_of_a_server_give_the_same_result(
    tree: Tree, tmp_path: Path, record_property: Record
) -> None:
    copied = tmp_path / "ComfyUI"
    shutil.copytree(tree.path, copied)
    have_patience(copied / "tests" / "execution")
    stock_output = run(copied, tmp_path / "stock.xml", XDIT_STRATEGY="off")
    active_output = run(copied, tmp_path / "active.xml", XDIT_GPUS="cpu:2")
    assert "xDiT: active" not in stock_output
    assert "xDiT: active on 2 CPU ranks" in active_output
    stock, active = outcomes(tmp_path / "stock.xml"), outcomes(tmp_path / "active.xml")
    kinds = sorted(set(stock.values()))
    record_property("stock", {k: list(stock.values()).count(k) for k in kinds})
    different = {name: (kind, active.get(name)) for name, kind in stock.items()}
    assert {n: k for n, k in different.items() if k[0] != k[1]} == {}, active_output[-4000:]
    assert active.keys() == stock.keys()
    assert sum(kind == "passed" for kind in stock.values()) > 0.9 * len(stock)
