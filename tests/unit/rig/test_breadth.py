"""What runs without ``--all``, and what a version of ComfyUI is skipped for."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig import trees
from rig.breadth import WHOLE, how_many, one_of_each
from rig.environment import RIG_CACHE, RigError
from rig.trees import trees_for_tests

pytest_plugins = ("pytester",)

MARKED = """
    import pytest
    from rig.trees import trees_for_tests

    @pytest.mark.every_version
    def test_everywhere(tree): pass

    def test_newest(tree): pass

    @pytest.mark.newest_only
    def test_no_difference(tree): pass

    @pytest.mark.thorough
    def test_thorough(tree): pass

    @pytest.mark.newest_only
    @pytest.mark.needs("comfy/ops.py", "what no version has")
    def test_lacking(tree): raise AssertionError("a version without it failed")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the rig's; nothing names a tree elsewhere."""
    monkeypatch.setenv(RIG_CACHE, str(tmp_path))
    monkeypatch.delenv(WHOLE, raising=False)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path


def write_tree(cache: Path, version: str) -> Path:
    tree = cache / "comfyui" / version
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").touch()
    (tree / "comfy/ops.py").write_text("class Known: pass\n")
    (tree / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return tree


def test_the_oldest_and_the_newest_are_tested_and_all_of_them_by_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("0.33.0", "0.3.75", "0.9.1"):
        write_tree(cache, version)
    assert [tree.version for tree in trees_for_tests()] == ["0.3.75", "0.33.0"]
    monkeypatch.setenv(WHOLE, "1")
    assert [tree.version for tree in trees_for_tests()] == ["0.3.75", "0.9.1", "0.33.0"]


def test_a_single_newer_version_is_all_that_is_tested(cache: Path) -> None:
    write_tree(cache, "0.99.0")
    assert [tree.version for tree in trees_for_tests()] == ["0.99.0"]


def test_an_empty_cache_gets_the_bundled_tree(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack() -> trees.Tree:
        return trees.read_tree(write_tree(cache, "0.3.75"))

    monkeypatch.setattr(trees, "_unpack_wheel", unpack)
    assert [tree.version for tree in trees_for_tests()] == ["0.3.75"]


def test_a_tree_is_asked_for_what_it_has(cache: Path) -> None:
    tree = trees.read_tree(write_tree(cache, "0.3.75"))
    assert tree.has(None)
    assert tree.has(("comfy/ops.py", "class Known"))
    assert not tree.has(("comfy/ops.py", "class Other"))
    assert not tree.has(("comfy/not_there.py", "class Known"))


def test_a_folder_that_is_no_tree_is_an_error_with_its_name(cache: Path) -> None:
    with pytest.raises(RigError, match=str(cache)):
        trees.read_tree(cache)


@pytest.mark.parametrize(
    ("arguments", "passed", "skipped"),
    [
        ((), 4, 1),  # everywhere on both, the others on the newest
        (("--all",), 7, 1),
    ],
    ids=["default", "--all"],
)
def test_marks_decide_what_runs_where(
    cache: Path,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    passed: int,
    skipped: int,
) -> None:
    for version in ("0.3.75", "0.33.0"):
        write_tree(cache, version)
    conftest = Path(__file__).parents[2] / "conftest.py"
    monkeypatch.setenv("PYTHONPATH", str(conftest.parent))
    pytester.makeconftest(conftest.read_text())
    pytester.makepyfile(test_marked=MARKED)
    result = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "-p", "no:xdist", "--import-mode=importlib", *arguments
    )
    result.assert_outcomes(passed=passed, skipped=skipped, deselected=0 if arguments else 1)


def test_a_variable_says_how_many_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WHOLE, raising=False)
    assert how_many(2, whole=9, variable="RIG_HOW_MANY") == 2
    monkeypatch.setenv(WHOLE, "1")
    assert how_many(2, whole=9, variable="RIG_HOW_MANY") == 9
    monkeypatch.setenv("RIG_HOW_MANY", "5")
    assert how_many(2, whole=9, variable="RIG_HOW_MANY") == 5


def test_one_row_of_each_kind_is_the_first() -> None:
    assert one_of_each({"a": 1, "b": 1, "c": 2}, lambda row: row) == {"a": 1, "c": 2}
