"""Models of the current code are written once, and those of older code do not stay."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import model_cache
from rig.environment import RIG_CACHE

ASKS = """
import sys
from rig import model_cache

def write(folder):
    folder.mkdir()
    (folder / "model").write_text("")

model_cache.SOURCES = sys.argv[1:]
print(model_cache.model_set("small", write), flush=True)
sys.stdin.read()
"""
WRITES_NO_MODEL = {"environment", "model_cache"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RIG_CACHE, str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def run_of_code(*sources: str) -> Iterator[Path]:
    """A process that has such code, asks for models, and then lives on."""
    environment = {**os.environ, "PYTHONPATH": str(Path(model_cache.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", ASKS, *sources],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
    finally:
        process.communicate()


def test_a_set_is_written_once(cache: Path) -> None:
    with run_of_code("weights.py") as first:
        written = (first / "model").stat().st_ino
        with run_of_code("weights.py") as second:
            assert second == first
            assert (second / "model").stat().st_ino == written
        assert [path.name for path in first.parent.iterdir() if path.name != ".in-use"] == ["small"]


def test_models_of_older_code_are_removed_when_nobody_uses_them(cache: Path) -> None:
    (cache / "models" / "h512-of-long-ago" / "vae").mkdir(parents=True)
    with run_of_code("weights.py") as older:
        with run_of_code("weights.py", "loras.py") as newer:
            assert (older / "model").exists(), "its process has not ended"
            assert (newer / "model").exists()
        with run_of_code("loras.py") as newest:
            assert {path.name for path in (cache / "models").iterdir()} == {
                older.parent.name,
                newest.parent.name,
            }


def test_all_code_that_writes_models_decides_where_they_lie() -> None:
    folder = Path(model_cache.__file__).parent
    used: set[str] = set()
    for source in model_cache.SOURCES:
        for node in ast.walk(ast.parse((folder / source).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "rig":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rig."):
                used.add((node.module or "").split(".")[1])
    assert {f"{name}.py" for name in used - WRITES_NO_MODEL} <= {*model_cache.SOURCES}
