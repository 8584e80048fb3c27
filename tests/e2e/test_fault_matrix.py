"""Every fault at every point of every rank: the image is stock's, and the next is parallel again.

The faults are real, in real processes: signals, exceptions, shut connections, torn messages. The
default run takes one of each mechanism; ``FAULTS_ALL=1`` takes the whole matrix on 2 ranks, and
``FAULTS_RANKS=3`` takes it on 3. ``FAULTS_CASES`` is a pattern that picks cases by name, and
``FAULTS_CARDS`` are the emulated cards of those that ranks on cards are tested with, and
``FAULTS_RESULTS`` a file to which each case adds a line: the whole takes more than an hour.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare_all
from rig.environment import RigError
from rig.fault_bench import DEADLINE_S, SIZE, START_S, STEPS, Bench
from rig.faults import EVERYWHERE, SOME_FAULTS, Fault, Orders, all_faults, is_running
from rig.server import Server, base_directory
from rig.trees import Tree

pytestmark = pytest.mark.newest_only

Record = Callable[[str, object], None]


def chosen() -> list[Fault]:
    ranks = os.environ.get("FAULTS_RANKS", "2")
    everything = "FAULTS_ALL" in os.environ or "FAULTS_RANKS" in os.environ
    faults = all_faults(int(ranks)) if everything else list(SOME_FAULTS)
    return [fault for fault in faults if re.search(os.environ.get("FAULTS_CASES", ""), fault.name)]


def on_cards() -> list[Fault]:
    """Out of memory wherever a rank can run out of it, and ranks lost at work and at rest."""
    ooms = [fault for fault in all_faults(2) if fault.kind == "oom"]
    some = [fault for fault in SOME_FAULTS if fault.point in ("within", "reply", "before", "idle")]
    some += [Fault("idle", "kill", 0), Fault("load", "kill", 1)]
    pattern = os.environ.get("FAULTS_CASES", "")
    return [fault for fault in (*ooms, *some) if re.search(pattern, fault.name)]


def keep(line: str) -> None:
    if path := os.environ.get("FAULTS_RESULTS"):
        with open(path, "a") as file:
            print(line, file=file)


@pytest.mark.slow  # workers start anew after most of them
def test_every_fault_costs_time_and_nothing_else(
    bench: Bench, orders: Orders, record_property: Record
) -> None:
    check_all(bench, orders, chosen(), record_property)


@pytest.mark.thorough
@pytest.mark.slow  # and every call with a card's tensor passes through Python
@pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled")
def test_every_fault_on_cards_leaves_nothing_on_them(
    servers: Callable[..., Server], tree: Tree, orders: Orders, record_property: Record
) -> None:
    cards = os.environ.get("FAULTS_CARDS", "4090,4090")
    check_all(Bench(servers, tree, orders, cards=cards), orders, on_cards(), record_property)


def check_all(bench: Bench, orders: Orders, faults: list[Fault], record: Record) -> None:
    """Check each of these faults, and name all that cost more."""
    bench.heal()
    failures = []
    for fault in faults:
        try:
            outcome = bench.check(fault)
            record(fault.name, outcome)
            keep(f"passed: {fault.name}: {outcome}")
        except (AssertionError, RigError, OSError) as error:
            failures.append(f"{fault.name}: {type(error).__name__}: {error}")
            keep(f"failed: {failures[-1]}")
            orders.withdraw()
            bench.heal()
    assert not failures, f"{len(failures)} of {len(faults)} failed:\n" + "\n".join(failures)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled")
def test_a_cancelled_step_leaves_nothing_on_the_cards(
    servers: Callable[..., Server], tree: Tree, orders: Orders
) -> None:
    bench = Bench(servers, tree, orders, cards="4090,4090")
    bench.heal()
    before, pids = bench.bytes_on_cards(), bench.pids
    orders.give(Fault("within", "delay", 1))
    _, graph = bench.graph_of()
    prompt = bench.ranks.post_prompt(graph)
    bench.wait_for_the_point()
    bench.ranks.interrupt()
    with pytest.raises(InterruptedError):
        bench.ranks.wait(prompt, DEADLINE_S)
    bench.heal()
    assert bench.pids == pids, "a cancel costs no rank"
    bench.check_cards(before)


def test_free_after_a_load_that_was_cancelled_frees_the_workers(
    bench: Bench, orders: Orders
) -> None:
    bench.heal()
    orders.give(Fault("load", "delay", 0))  # of a run that finds its model held
    _, graph = bench.graph_of()
    prompt = bench.ranks.post_prompt(graph)
    bench.wait_for_the_point()
    bench.ranks.interrupt()
    with pytest.raises(InterruptedError):
        bench.ranks.wait(prompt, DEADLINE_S)
    assert all(rank["weight_bytes"] for rank in bench.ranks.status()["ranks"])
    bench.ranks.free_and_wait()
    bench.heal()


def ends_to_test() -> list[tuple[str, int]]:
    everything = [(kind, rank) for rank in (0, 1) for kind in (*EVERYWHERE, "hang")]
    return everything if "FAULTS_ALL" in os.environ else [("stop", 0)]


@pytest.mark.slow  # a server for each case: it ends
@pytest.mark.parametrize(("kind", "rank"), ends_to_test())
def test_comfyui_ends_soon_whatever_a_worker_does(
    tree: Tree, orders: Orders, tmp_path: Path, kind: str, rank: int, record_property: Record
) -> None:
    shared = set(os.listdir("/dev/shm"))
    env = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": str(START_S), "RIG_FAULTS": str(orders.path)}
    models = models_directory(Sizes(hidden=256))
    with base_directory(tmp_path / "base", models) as base, Server(tree, base, env=env) as server:
        server.run(graphs.with_values(graphs.load("ksampler_dev"), seed=1, steps=1), DEADLINE_S)
        workers = [each["pid"] for each in server.status()["ranks"]]
        assert all(is_running(pid) for pid in workers)
        orders.give(Fault("shutdown", kind, rank))
        assert server.process is not None
        start = time.monotonic()
        os.kill(server.process.pid, signal.SIGINT)  # Ctrl+C
        server.process.wait(30.0)
        seconds = time.monotonic() - start
        assert not orders.open(), "the fault never happened"
        assert not [pid for pid in workers if is_running(pid)]
        assert set(os.listdir("/dev/shm")) <= shared
    record_property("seconds from Ctrl+C to the end", seconds)
    assert seconds < 10.0


NO_SHM = """
mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"
"""


@pytest.mark.slow  # a server of its own, for no other can be inside
def test_a_full_dev_shm_disturbs_nobody(
    servers: Callable[..., Server], tree: Tree, tmp_path: Path
) -> None:
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount"]
    within = [*unshare, "sh", "-c", NO_SHM, "sh"]
    allowed = subprocess.run([*within, "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"this system allows no private mount: {allowed.stderr.decode().strip()}")
    graph = graphs.with_values(graphs.load("ksampler_dev"), seed=2, size=SIZE, steps=STEPS)
    stock = servers(tree, XDIT_STRATEGY="off")
    expected = stock.images(stock.run(graph, DEADLINE_S))
    models = models_directory(Sizes(hidden=512, variants=True))
    env = {"XDIT_GPUS": "cpu:2", "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": str(START_S)}
    with (
        base_directory(tmp_path / "base", models) as base,
        Server(tree, base, env=env, within=within) as server,
    ):
        difference = compare_all(expected, server.images(server.run(graph, DEADLINE_S)))
        assert difference.is_equal, str(difference)
        assert server.status()["last_run"]["steps_parallel"] == STEPS
        root = Path("/proc", str(server.status()["ranks"][0]["pid"]), "root")
        assert os.listdir(root / "dev/shm") == ["full"]
