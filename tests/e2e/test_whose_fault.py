"""An exception of ComfyUI's or a node's own passes as it is, and costs no rank.

A file or a weight that is changed under us is never taken for what it was.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import graphs
from rig.breadth import is_whole
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare_all
from rig.environment import RigError
from rig.graphs import Graph
from rig.server import Server
from rig.trees import Tree

Servers = Callable[..., Server]
Pair = Callable[..., tuple[Server, Server]]
PACK = Path(__file__).parents[1] / "rig" / "node_packs" / "mistakes"
MODEL = Path("diffusion_models", "flux1-dev.safetensors")
DEADLINE_S = 300.0
STEPS = 2
TIMES = 20 if is_whole() else 4
"""How often each mistake is made; four losses in a row keep the workers away for two minutes."""
EDITS = int(os.environ.get("WEIGHT_EDITS", 60 if is_whole() else 8))
_seeds = iter(range(400, 10_000))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files of these tests' own: some are written to."""
    folder: Path = tmp_path_factory.mktemp("models") / "models"
    shared = models_directory(Sizes(hidden=256))
    shutil.copytree(shared, folder, copy_function=os.link)
    for change in CHANGES:
        shutil.copyfile(shared / MODEL, folder / MODEL.with_name(f"{change.__name__}.safetensors"))
    return folder


@pytest.fixture
def pair(servers: Servers, tree: Tree, models: Path) -> Pair:
    """Return a stock server and one with two ranks, with the pack of mistakes."""

    def started(strict: bool = False) -> tuple[Server, Server]:
        setup: dict[str, Any] = {"models": models, "node_packs": (PACK,)}
        ranks = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": "400", "XDIT_STRICT": str(int(strict))}
        return servers(tree, XDIT_STRATEGY="off", **setup), servers(tree, **ranks, **setup)

    return started


def a_graph() -> Graph:
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=next(_seeds), size=(96, 96), steps=STEPS)


def with_node(kind: str, after: str, output: str, **inputs: Any) -> Graph:
    """A graph with a node of the pack between the node ``after`` and those that use it."""
    graph = a_graph()
    for node in graph.values():
        for name, value in node["inputs"].items():
            if value == [after, 0]:
                node["inputs"][name] = ["50", 0]
    graph["50"] = {"class_type": kind, "inputs": {output: [after, 0], **inputs}}
    return graph


def wrong_encoder() -> Graph:
    return with_node("RigOtherEncoder", "4", "conditioning")


def video_latent() -> Graph:
    graph = a_graph()
    inputs = {"width": 96, "height": 96, "length": 5, "batch_size": 1}
    graph["50"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": inputs}
    graph["8"]["inputs"]["latent_image"] = ["50", 0]
    return graph


def old_pack() -> Graph:
    return with_node("RigOldPack", "1", "model")


def early_error() -> Graph:
    return with_node("RigEarlyError", "1", "model", seed=next(_seeds))


def late_error() -> Graph:
    return with_node("RigLateError", "1", "model")


def error_of(server: Server, graph: Graph) -> str:
    """What ComfyUI tells its user of a prompt that fails, without the places in the code."""
    with pytest.raises(RigError) as caught:
        server.run(graph, DEADLINE_S)
    return str(caught.value).partition('  File "')[0]


def assert_parallel(server: Server) -> None:
    server.run(a_graph(), DEADLINE_S)
    run = server.status()["last_run"]
    assert run["steps_parallel"] == run["steps"] == STEPS, run


def pids(server: Server) -> list[int]:
    return [rank["pid"] for rank in server.status()["ranks"]]


MISTAKES = {wrong_encoder: TIMES, video_latent: TIMES, old_pack: 1, early_error: 1, late_error: 1}


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_mistake_is_comfyuis_to_explain_and_costs_no_rank(pair: Pair, strict: bool) -> None:
    stock, ranks = pair(strict)
    assert_parallel(ranks)
    before, said = pids(ranks), len(ranks.log_text())
    for mistake, times in MISTAKES.items():
        expected = error_of(stock, mistake())
        for _ in range(times):
            assert error_of(ranks, mistake()) == expected
    assert pids(ranks) == before
    assert "xDiT: " not in ranks.log_text()[said:], "nothing is said of what is not ours"
    assert_parallel(ranks)


def assert_equal(pair: tuple[Server, Server], graph: Graph) -> None:
    stock, ranks = pair
    expected = stock.images(stock.run(graph, DEADLINE_S))
    difference = compare_all(expected, ranks.images(ranks.run(graph, DEADLINE_S)))
    assert difference.is_equal, str(difference)


def test_weights_edited_in_place_are_seen_wherever_and_however(pair: Pair) -> None:
    """In strict mode the ranks' weights are compared with ComfyUI's, bit for bit."""
    choices = random.Random(int(os.environ.get("FUZZ_FIRST", "1")))
    both = pair(strict=True)
    assert_equal(both, a_graph())
    for _ in range(EDITS):
        seed = choices.randrange(2**40)
        graph = with_node("RigEditWeights", "1", "model", seed=seed)
        try:
            assert_equal(both, graph)
        except (AssertionError, RigError) as error:
            raise AssertionError(f"edit {seed}") from error
        run = both[1].status()["last_run"]
        assert run["steps_parallel"] == STEPS, (seed, run)


def rewritten(path: Path) -> bytes:
    """The bytes of a model file with the last tenth of it changed."""
    data = bytearray(path.read_bytes())
    tail = np.frombuffer(data, dtype=np.uint8)[-len(data) // 10 :]
    tail[::2] ^= 8
    return bytes(data)


def in_place(path: Path) -> None:
    data = rewritten(path)
    with path.open("r+b") as file:
        file.write(data)


def in_place_and_dated_back(path: Path) -> None:
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_renaming(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(rewritten(path))
    new.rename(path)


def truncated_first(path: Path) -> None:
    path.write_bytes(rewritten(path))


CHANGES = (in_place, truncated_first, in_place_and_dated_back, by_renaming)
IN_SHORT = CHANGES[2:]


@pytest.mark.parametrize("change", CHANGES if is_whole() else IN_SHORT)
def test_a_model_file_that_changes_under_us_is_never_read_as_if_it_had_not(
    pair: Pair, models: Path, change: Callable[[Path], None]
) -> None:
    """Also not by ranks that are started anew: what ComfyUI holds is carried to them."""
    both = pair()
    ranks = both[1]
    path = MODEL.with_name(f"{change.__name__}.safetensors")

    def graph() -> Graph:
        made = a_graph()
        made["1"]["inputs"]["unet_name"] = path.name
        return made

    assert_equal(both, graph())
    change(models / path)
    for is_lost in (False, True):
        if is_lost:
            killed = pids(ranks)[1]
            os.kill(killed, signal.SIGKILL)
            wait_until_ready(ranks, without=killed)
        assert_equal(both, graph())
        run = ranks.status()["last_run"]
        assert run["steps_parallel"] == STEPS, run


def wait_until_ready(server: Server, *, without: int) -> None:
    """Wait for ranks that are there, and not for the one whose end nobody has seen yet."""
    end = time.monotonic() + DEADLINE_S
    while server.status()["state"] != "ready" or {None, without} & {*pids(server)}:
        assert time.monotonic() < end, server.status()
        time.sleep(0.2)
