"""Memory of host and workers: one copy of a model's file for all, and given back when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare_all
from rig.memory import mapped_file, own_memory
from rig.server import Server, base_directory
from rig.trees import Tree, trees_for_tests

pytestmark = pytest.mark.slow  # 4 ranks and a model of 1 GB

DEADLINE_S = 600.0
# float32 is what ComfyUI computes in on a CPU: nothing is cast. About FLUX.1's ratio of blocks.
SIZES = Sizes(hidden=768, double=6, single=12, dtype="float32")
FILE = "diffusion_models/flux1-dev.safetensors"
NUM_RANKS = 4
ENV = {"XDIT_GPUS": f"cpu:{NUM_RANKS}", "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
# Neither whole copies fit nor those that share the modulation; shards do: the status says so, with
# the arithmetic.
SHARDED = ENV | {"XDIT_GPU_MEMORY": "2.6"}

Record = Callable[[str, object], None]


def graph_of(seed: int) -> graphs.Graph:
    return graphs.with_values(graphs.load("ksampler_dev"), seed=seed, size=(128, 128), steps=1)


@pytest.fixture(scope="module")
def newest() -> Tree:
    return trees_for_tests()[-1]


@pytest.fixture(scope="module")
def model_file() -> Path:
    return models_directory(SIZES) / FILE


@pytest.fixture(scope="module")
def stock(newest: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("stock")
    with (
        base_directory(path, models_directory(SIZES)) as base,
        Server(newest, base, env={"XDIT_STRATEGY": "off"}) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def started(
    newest: Tree, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """``started(env)``: a server with these settings; one at a time."""
    running: list[tuple[Server, tuple[str, ...]]] = []
    with ExitStack() as stack:

        def start(env: dict[str, str], *args: str) -> Server:
            if running and running[-1][1] == args:
                running[-1][0].have(env)
                return running[-1][0]
            stack.close()
            path = tmp_path_factory.mktemp("ranks")
            base = stack.enter_context(base_directory(path, models_directory(SIZES)))
            server = stack.enter_context(Server(newest, base, env=env, extra_args=args))
            running.append((server, args))
            return server

        yield start


def check(stock: Server, ranks: Server, seed: int) -> None:
    """One image on both, equal and parallel."""
    expected = stock.images(stock.run(graph_of(seed), DEADLINE_S))
    difference = compare_all(expected, ranks.images(ranks.run(graph_of(seed), DEADLINE_S)))
    assert difference.is_equal, str(difference)
    run = ranks.status()["last_run"]
    assert run["steps_parallel"] == run["steps"] == 1


def worker_pids(server: Server) -> list[int]:
    return [rank["pid"] for rank in server.status()["ranks"]]


def used(pids: list[int], model_file: Path) -> int:
    """Bytes of these processes' own, and of the mapped file, a page counted once for all of them.

    Libraries do not count: they are shared with whatever else runs on the machine.
    """
    mapped = mapped_file(pids, model_file)
    once = (mapped.shared + mapped.private_clean + mapped.private_dirty) // len(pids)
    return sum(map(own_memory, pids)) + once


def test_four_ranks_share_one_copy_of_the_file_and_give_it_back(
    stock: Server,
    started: Callable[..., Server],
    model_file: Path,
    record_property: Record,
) -> None:
    ranks = started(ENV)
    check(stock, ranks, seed=1)
    assert stock.process is not None
    assert ranks.process is not None
    file_bytes = model_file.stat().st_size
    pids = worker_pids(ranks)
    alone = used([stock.process.pid], model_file)
    host = used([ranks.process.pid], model_file)
    workers = used(pids, model_file)
    mapped = mapped_file(pids, model_file)
    ranks.free_and_wait()
    idle = used(pids, model_file)
    grown = workers - idle
    figures = {
        "file": file_bytes,
        "stock": alone,
        "host": host,
        "4 workers": workers,
        "of it the mapped file": mapped.pss,
        "4 workers without a model": idle,
        "host + workers, of 1.25 x stock + workers without a model": (
            (host + workers) / (1.25 * alone + idle)
        ),
    }
    record_property("bytes", figures)

    # Each page of the file is there once for all four, and what is private beside it is small.
    assert mapped.pss <= 1.02 * file_bytes
    assert mapped.shared >= 0.95 * NUM_RANKS * file_bytes
    assert grown - mapped.pss <= 0.3 * file_bytes, "private copies of weights"
    # Nothing but what each rank must own, and the ranks' one copy of the weights, beside stock.
    assert host + workers <= 1.25 * alone + idle + file_bytes
    assert mapped_file(pids, model_file).pss == 0, "the file is still mapped after Free"
    # And back, from the page cache.
    check(stock, ranks, seed=2)
    assert used(worker_pids(ranks), model_file) <= 1.05 * workers


@pytest.mark.thorough  # test_weight_sharding.py holds four ranks to the same share.
def test_sharded_each_of_four_ranks_holds_less_than_a_third(
    stock: Server,
    started: Callable[..., Server],
    model_file: Path,
    record_property: Record,
) -> None:
    ranks = started(SHARDED)
    check(stock, ranks, seed=1)
    status = ranks.status()
    assert status["residency"][0].startswith("weights sharded over the ranks"), status["residency"]
    shares = [rank["weight_bytes"] / model_file.stat().st_size for rank in status["ranks"]]
    record_property("shares", shares)

    assert max(shares) <= 0.30
    assert sum(shares) >= 1


@pytest.mark.thorough  # Each run has the endurance of a server, whose memory may not grow.
def test_without_smart_memory_nothing_stays_and_nothing_grows(
    stock: Server, started: Callable[..., Server], record_property: Record
) -> None:
    ranks = started(ENV | {"XDIT_GPUS": "cpu:2"}, "--disable-smart-memory")
    after = []
    for seed in range(3):
        check(stock, ranks, seed)
        time.sleep(2)
        after.append(sum(map(own_memory, worker_pids(ranks))))
    record_property("own memory of 2 workers after each prompt", after)

    assert max(after) <= 1.05 * after[0]
