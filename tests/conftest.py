"""Fixtures that are factories: ComfyUI processes, models, environments."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inside.client import Inside
from rig.breadth import WHOLE, is_whole
from rig.checkpoints import Sizes, models_directory
from rig.environment import RIG_CACHE, cache_root
from rig.faults import Orders
from rig.server import door_key
from rig.trees import Tree, trees_for_tests

TIERS = ("unit", "contract", "parallel", "e2e")
# Files whose tests share servers, longest first: the last to end should be short.
SERVERS = {
    "faults": "endurance, fault_matrix, faults, first_image",
    "mistakes": "whose_fault",
    "emulated": "emulated_cards, emulated_matrix, card_memory, check, cuda_graphs",
    "": "auto, comfyui_own_execution, equal_to_stock, memory, offline, soak, steering, switching",
    "weights": "hooks, named_strategies, weight_traffic, weights",
    "features": "features, fuzz, controls, named_on_features, compiled",
    "neighbours": "neighbours, security",
    "panel": "panel",
    "corpus": "corpus",
}
SERVERS_OF = {f"test_{file}": name for name, files in SERVERS.items() for file in files.split(", ")}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No XDIT_* variable of the developer reaches a test."""
    for name in os.environ:
        if name.startswith("XDIT_"):
            monkeypatch.delenv(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="everything, on every ComfyUI found")


def pytest_configure(config: pytest.Config) -> None:
    """Give every process of the tests a cache that is not the user's, and say what runs."""
    if config.getoption("--all"):
        os.environ[WHOLE] = "1"
    if hasattr(config, "workerinput"):
        return  # A process of pytest-xdist: it has the variables of the one that started it.
    os.environ[RIG_CACHE] = str(cache_root())
    folder = tempfile.mkdtemp(prefix="xdit-tests-cache-")
    os.environ["XDG_CACHE_HOME"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_report_header() -> str:
    if is_whole():
        return "everything, on every ComfyUI found"
    return "one of each mechanism on the newest ComfyUI; --all runs everything"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``tree`` on the newest ComfyUI; if it is marked so, on others too.

    ``every_version`` is for what stands for all: the oldest ComfyUI must run it always.
    ``newest_only`` is for what does not differ between versions.
    """
    if "tree" in metafunc.fixturenames:
        marks = {mark.name for mark in metafunc.definition.iter_markers()}
        is_everywhere = "newest_only" not in marks and (is_whole() or "every_version" in marks)
        trees = trees_for_tests()[0 if is_everywhere else -1 :]
        metafunc.parametrize("tree", trees, ids=[t.version for t in trees], scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first; then those side by side that share servers, for a start costs a minute."""
    if not is_whole():
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
    for item in items:
        _skip_what_is_not_there(item)
    items.sort(key=_place)


def _skip_what_is_not_there(item: pytest.Item) -> None:
    """Skip a test marked ``needs(file, text)`` where the ComfyUI has no such file with that text.

    A version that nobody knows yet may lack what all known ones have: it skips, it does not fail.
    """
    tree = getattr(getattr(item, "callspec", None), "params", {}).get("tree")
    for mark in item.iter_markers("needs"):
        if tree is not None and not tree.has(mark.args):
            why = f"ComfyUI {tree.version} has no {mark.args[1]!r} in {mark.args[0]}"
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist, tests that share something run in one process.

    Its own ``--dist loadgroup`` writes to an attribute that pytest 9.2 does not read any more.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def _group(nodeid: str) -> str:
    """Name what a test shares with others: processes, or servers that have the same models."""
    path = nodeid.split("::")[0]
    tier = next((tier for tier in TIERS if f"tests/{tier}/" in path), TIERS[-1])
    version = re.search(r"\[(\d+\.\d+\.\d+)", nodeid)
    if tier == "parallel":  # Seven ranks at native width, twice at a time, do not fit into 24 GiB.
        return tier
    if version is None and tier != "e2e":
        return "quick"
    return f"{tier} {version and version[1]} {SERVERS_OF.get(Path(path).stem, '')}"


def _place(item: pytest.Item) -> tuple[int, int, int, str]:
    """Return the tier, the ComfyUI, newest first, the servers a test needs, and its ranks."""
    tier = next((t for t in TIERS if f"/tests/{t}/" in str(item.path)), TIERS[-1])
    values = getattr(getattr(item, "callspec", None), "params", {})
    tree, marker = values.get("tree"), item.get_closest_marker("group")
    group = str(values.get("num_ranks", 2)) if marker is None else str(marker.args[0])
    servers = SERVERS_OF.get(item.path.stem, "") if tier == "e2e" else ""
    version = -1 if tree is None else len(trees_for_tests()) - trees_for_tests().index(tree)
    return TIERS.index(tier), version, list(SERVERS).index(servers), group


@pytest.fixture(scope="session")
def flux_dev() -> Callable[..., str]:
    """Path of a tiny FLUX.1-dev file: ``flux_dev(hidden=512)``."""

    def path(**sizes: int) -> str:
        return str(models_directory(Sizes(**sizes)) / "diffusion_models/flux1-dev.safetensors")

    return path


_inside: dict[tuple[str, tuple[tuple[str, str], ...]], Inside] = {}
"""By ComfyUI and what ``door_key`` leaves of the environment."""


@pytest.fixture(scope="session")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Orders:
    """Where faults are ordered."""
    return Orders(Path(tmp_path_factory.mktemp("orders")))


@pytest.fixture(scope="session")
def close_inside() -> Callable[[], None]:
    """End all processes of ``inside``; the next call starts new ones."""

    def close() -> None:
        while _inside:
            _inside.popitem()[1].close()

    return close


@pytest.fixture(scope="session")
def inside(close_inside: Callable[[], None], orders: Orders) -> Iterator[Callable[..., Inside]]:
    """Long-lived ComfyUI processes: ``inside(tree, XDIT_GPUS="cpu:2")``."""
    started = _inside

    def process(tree: Tree, **env: str) -> Inside:
        if "XDIT_GPUS" in env:
            env["RIG_FAULTS"] = str(orders.path)
        key = (tree.version, tuple(sorted(door_key(env).items())))
        if key not in started:
            # One pool of workers at a time: two cores, 24 GiB.
            for other, running in list(started.items()):
                if "XDIT_GPUS" in running.env and "XDIT_GPUS" in env:
                    running.close()
                    del started[other]
            started[key] = Inside(tree, env)
        started[key].have(env)
        return started[key]

    yield process
    close_inside()
