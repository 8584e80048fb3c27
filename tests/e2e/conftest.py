"""Real servers, started once and shared: stock, and one at a time with ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rig.checkpoints import Sizes, models_directory
from rig.fault_bench import Bench
from rig.faults import Orders
from rig.lone import LoneServer
from rig.server import Server, base_directory, door_key
from rig.trees import Tree, trees_for_tests

import comfy_xdit_patch

Servers = Callable[..., Server]
GGUF_PACK = Path(__file__).parents[1] / "rig" / "gguf_pack"

MAX_STOCK_SERVERS = 2


@pytest.fixture(scope="session", autouse=True)
def _no_process_of_the_tiers_before(close_inside: Callable[[], None]) -> None:
    """Servers need the memory of the processes that the other tests share."""
    close_inside()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """``servers(tree, XDIT_GPUS="cpu:2")``; every other keyword is an XDIT_* variable.

    ``variants`` adds the model files of ``rig.checkpoints``; ``models`` is a directory instead of
    these; ``node_packs`` are custom nodes, ``extra_args`` ComfyUI's own options, ``device`` one of
    ``Server``'s. Most tests leave all alone and so share one stock server and one with ranks.
    """
    running: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[Server, ExitStack]] = {}

    def server(
        tree: Tree,
        *,
        hidden: int = 512,
        variants: bool = True,
        node_packs: tuple[Path, ...] = (GGUF_PACK,),
        models: Path | None = None,
        extra_args: tuple[str, ...] = (),
        device: str = "cpu",
        **env: str,
    ) -> Server:
        kind = ("models", f"{hidden} {variants} {node_packs} {models} {extra_args} {device}")
        key = (tree.version, (kind, *sorted(door_key(env).items())))
        if key in running and running[key][0].process.poll() is None:  # type: ignore[union-attr]
            running[key] = running.pop(key)  # used last
            running[key][0].have(env)
            return running[key][0]
        # One server with ranks at a time, and a few stock ones: 24 GiB.
        has_ranks = "XDIT_GPUS" in env
        alike = [k for k in running if ("XDIT_GPUS" in running[k][0].env) == has_ranks]
        for other in alike if has_ranks else alike[: 1 - MAX_STOCK_SERVERS or None]:
            running.pop(other)[1].close()
        stack = ExitStack()
        path = Path(tmp_path_factory.mktemp("comfyui"))
        models = models or models_directory(Sizes(hidden=hidden, variants=variants))
        base = stack.enter_context(base_directory(path, models))
        started = Server(
            tree, base, env=env, node_packs=node_packs, extra_args=extra_args, device=device
        )
        running[key] = (stack.enter_context(started), stack)
        return started

    yield server
    for _, stack in running.values():
        stack.close()


@pytest.fixture(scope="session")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoneServer]:
    """``lone()``: one more server with two ranks, beside those of ``servers``."""
    package = Path(comfy_xdit_patch.__file__).parent
    tree = trees_for_tests()[-1]
    started = LoneServer(tree, tmp_path_factory.mktemp("lone"), watched=(tree.path, package))
    yield started
    started.stop()


@pytest.fixture
def bench(servers: Servers, tree: Tree, orders: Orders) -> Bench:
    """Servers of this moment, for a test that disturbs them."""
    return Bench(servers, tree, orders, num_ranks=int(os.environ.get("FAULTS_RANKS", "2")))
