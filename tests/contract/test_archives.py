"""What is published: an sdist from which the demo and the tests run, and a wheel without strays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomllib
from rig.repository import REPO, repository_files
from rig.trees import Tree

import comfy_xdit_patch

NAME = f"comfy_xdit_patch-{comfy_xdit_patch.__version__}"
START = ("comfy_xdit_patch.pth", "comfy_xdit_patch.start")
DEADLINE_S = 300


def files_of(folder: str = "") -> set[str]:
    if not (REPO / ".git").exists():
        pytest.skip("not a clone: nobody says which files belong to it")
    names = (path.relative_to(REPO).as_posix() for path in repository_files())
    return {name for name in names if name.startswith(folder)}


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True, timeout=DEADLINE_S)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_has_the_package_and_its_start_files_and_nothing_else(tmp_path: Path) -> None:
    expected = files_of("comfy_xdit_patch/") - {f"comfy_xdit_patch/start/{name}" for name in START}
    expected.add("comfy_xdit_patch/report/troubleshooting.md")  # Remedies are read from it.
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - info == expected | set(START)
    assert {Path(name).name for name in info} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "LICENSE",
    }


def test_the_sdist_has_every_file_and_the_tests_and_the_demo_start_from_it(tmp_path: Path) -> None:
    expected = files_of()
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        assert set(sdist.getnames()) == {f"{NAME}/{name}" for name in {*expected, "PKG-INFO"}}
        sdist.extractall(tmp_path, filter="data")
    unpacked = tmp_path / NAME
    assert os.access(unpacked / ".ci" / "run", os.X_OK)
    environment = {**os.environ, "PYTHONPATH": str(unpacked / "tests")}
    pytest_of_it = ["-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    for command, sign in (
        ([*pytest_of_it, "--collect-only", "tests/unit/host"], r"\d{3} tests collected"),
        (["-m", "rig.demo", "--help"], "--workflow"),
        (["install.py", "--help"], "--uninstall"),
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=unpacked,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(sign, done.stdout), done.stdout


def test_the_project_states_what_the_registry_asks_for(tree: Tree) -> None:
    """Read as ComfyUI reads it; the rules are those of docs.comfy.org/registry/specifications."""
    project: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from comfy_config.config_parser import extract_node_configuration as read\n"
        "found = read(sys.argv[2])\n"
        "print(found.project.name, found.project.urls.repository, found.tool_comfy.publisher_id,\n"
        "      found.tool_comfy.display_name, found.project.supported_comfyui_version,\n"
        "      found.project.supported_os, found.project.supported_accelerators)\n"
    )
    command = [sys.executable, "-c", code, str(tree.path), str(REPO)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    urls, comfy = project["project"]["urls"], project["tool"]["comfy"]
    assert done.stdout.split("\n")[0] == (
        f"comfy-xdit-patch {urls['Repository']} {comfy['PublisherId']} {comfy['DisplayName']} "
        f"{comfy['requires-comfyui']} ['POSIX :: Linux'] ['GPU :: NVIDIA CUDA']"
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", comfy_xdit_patch.__version__)
