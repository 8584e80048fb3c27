"""Other packages in ComfyUI's process, other ComfyUIs beside it: every image is stock's."""

from __future__ import annotations

import http.client
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import graphs
from rig.client import Client
from rig.compare import compare_all
from rig.lone import LoneServer
from rig.outputs import Pixels
from rig.server import SHIM, Server
from rig.trees import Tree

DEADLINE_S = 300.0
NUM_STEPS = 3
TESTS = Path(__file__).parents[1]
PACK = TESTS / "rig" / "node_packs" / "alone" / "neighbours"
EARLY = TESTS / "rig" / "neighbours_early"
SMALL: dict[str, Any] = {"hidden": 256, "variants": False}
MULTIGPU = "MultiGPU_WorkUnits"

Servers = Callable[..., Server]


def graph_of(seed: int, steps: int = NUM_STEPS) -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=seed, size=(128, 128), steps=steps)


@pytest.fixture(scope="module")
def early_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("early") / "log"


@pytest.fixture
def crowded(servers: Servers, tree: Tree, early_log: Path) -> Server:
    """A server with all neighbours at once, before us and after us."""
    return servers(
        tree,
        XDIT_GPUS="cpu:2",
        XDIT_START_TIMEOUT="400",
        PYTHONPATH=f"{EARLY}:{SHIM}",
        RIG_EARLY_LOG=f"{early_log}-{tree.version}",
        node_packs=(PACK,),
        extra_args=("--multi-user",),
        **SMALL,
    )


def stock_image(servers: Servers, tree: Tree, graph: graphs.Graph) -> list[Pixels]:
    stock = servers(tree, XDIT_STRATEGY="off", **SMALL)
    return stock.images(stock.run(graph, DEADLINE_S))


def assert_equal(expected: list[Pixels], found: list[Pixels]) -> None:
    difference = compare_all(expected, found)
    assert difference.is_equal, str(difference)


def assert_parallel(server: Client, steps: int = NUM_STEPS) -> None:
    run = server.status()["last_run"]
    assert run["steps_parallel"] == steps, run
    assert run["fall_back_reasons"] == {}


def pids_of(server: Client) -> list[int]:
    return [rank["pid"] for rank in server.status()["ranks"]]


def wait_until(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    return state_of(pid) in ("", "Z")


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def test_neighbours_in_the_process_change_nothing(
    servers: Servers, tree: Tree, crowded: Server, early_log: Path
) -> None:
    expected = stock_image(servers, tree, graph_of(800))
    assert_equal(expected, crowded.images(crowded.run(graph_of(800), DEADLINE_S)))
    assert_parallel(crowded)
    at_work = crowded.request("/neighbours")
    for name in (
        "process_group",
        "threads",
        "forks",
        "forks_at_a_start",
        "subprocesses",
        "load_models_gpu",
        "Flux.forward",
        "Flux._forward",
        "BaseModel.apply_model",
        "BaseModel._apply_model",
        "CFGGuider.outer_sample",
        "sd.load_diffusion_model",
        "model_management.free_memory",
    ):
        assert at_work[name] > 0, f"{name} was not at work: {at_work}"
    early = Path(f"{early_log}-{tree.version}").read_text()
    for name in ("Flux._forward function", "BaseModel._apply_model function"):
        assert name in early, "it came before us: what it wrapped was ComfyUI's own function"
    for name in crowded.log_text().splitlines():
        assert "a fault of comfy-xdit-patch" not in name


@pytest.mark.newest_only
def test_prompts_of_several_clients_at_once_are_all_right(
    servers: Servers, tree: Tree, crowded: Server
) -> None:
    clients = [Client(int(crowded.url.rsplit(":")[-1]), crowded.base_dir, crowded.log_path)]
    clients += [Client(int(crowded.url.rsplit(":")[-1]), crowded.base_dir, crowded.log_path)]
    expected = {seed: stock_image(servers, tree, graph_of(seed)) for seed in range(810, 814)}
    prompts = {seed: clients[seed % 2].post_prompt(graph_of(seed)) for seed in expected}
    before = crowded.status()["totals"]["steps_parallel"]
    for seed, prompt in prompts.items():
        history = clients[seed % 2].wait(prompt, DEADLINE_S)
        assert_equal(expected[seed], crowded.images(history))
    assert crowded.status()["totals"]["steps_parallel"] - before <= len(prompts) * NUM_STEPS
    assert_parallel(crowded)


def test_comfyuis_own_multigpu_node_on_the_same_graph(
    servers: Servers, tree: Tree, crowded: Server
) -> None:
    graph = graph_of(820)
    if MULTIGPU not in crowded.request("/object_info"):
        pytest.skip(f"ComfyUI {tree.version} has no node {MULTIGPU}")
    (sampler,) = (node for node in graph.values() if node["class_type"] == "KSampler")
    graph["multigpu"] = {
        "class_type": MULTIGPU,
        "inputs": {"model": sampler["inputs"]["model"], "max_gpus": 2},
    }
    sampler["inputs"]["model"] = ["multigpu", 0]
    expected = stock_image(servers, tree, graph)
    assert_equal(expected, crowded.images(crowded.run(graph, DEADLINE_S)))
    assert_parallel(crowded)


@pytest.mark.newest_only
def test_a_dead_worker_is_noticed_while_forked_children_hold_its_channel(
    servers: Servers, tree: Tree, crowded: Server
) -> None:
    """The children were forked at its start: they have the worker's own end of the channel."""
    expected = stock_image(servers, tree, graph_of(830, steps=40))
    wait_until(lambda: crowded.status()["state"] == "ready", 60, "ready")
    crowded.run(graph_of(829), DEADLINE_S)
    old = pids_of(crowded)
    assert crowded.request("/neighbours")["forks_at_a_start"] >= len(old)
    prompt = crowded.post_prompt(graph_of(830, steps=40))
    wait_until(lambda: crowded.num_steps_done(prompt) >= 2, 60, "two steps")
    killed_at = time.time()
    os.kill(old[1], signal.SIGKILL)
    assert_equal(expected, crowded.images(crowded.wait(prompt, DEADLINE_S)))
    status = crowded.status()
    assert set(status["last_run"]["fall_back_reasons"]) == {"a worker was lost"}
    assert 0 < status["last_loss_unix_s"] - killed_at < 1.0
    wait_until(lambda: all(state_of(pid) == "" for pid in old), 2, "no zombie is left")


@pytest.mark.newest_only
def test_two_comfyuis_do_not_know_of_each_other(
    servers: Servers, tree: Tree, crowded: Server, lone: LoneServer
) -> None:
    second = lone()
    both = (crowded, second)
    expected = [stock_image(servers, tree, graph_of(840 + n)) for n in range(2)]
    prompts = [server.post_prompt(graph_of(840 + n)) for n, server in enumerate(both)]
    for server, prompt, image in zip(both, prompts, expected, strict=True):
        assert_equal(image, server.images(server.wait(prompt, DEADLINE_S)))
        assert_parallel(server)
    pids = pids_of(crowded)
    expected = [stock_image(servers, tree, graph_of(842 + n, steps=20)) for n in range(2)]
    prompts = [server.post_prompt(graph_of(842 + n, steps=20)) for n, server in enumerate(both)]
    wait_until(lambda: second.num_steps_done(prompts[1]) >= 2, 60, "two steps")
    for pid in pids_of(second):
        os.kill(pid, signal.SIGKILL)
    for server, prompt, image in zip(both, prompts, expected, strict=True):
        assert_equal(image, server.images(server.wait(prompt, DEADLINE_S)))
    assert_parallel(crowded, steps=20)
    assert pids_of(crowded) == pids
    assert second.status()["last_run"]["steps_fell_back"] > 0


@pytest.mark.newest_only
def test_a_restart_in_the_same_process_leaves_nothing_behind(
    servers: Servers, tree: Tree, lone: LoneServer
) -> None:
    """ComfyUI-Manager's restart replaces the program and keeps the process."""
    server = lone()
    assert server.process is not None
    pid = server.process.pid
    wait_until(lambda: server.status()["state"] == "ready", 100, "ready")
    old, logs = pids_of(server), [Path(rank["log"]) for rank in server.status()["ranks"]]
    assert len(old) == 2
    assert all(log.exists() for log in logs)
    request = urllib.request.Request(f"{server.url}/neighbours/restart", b"", method="POST")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        urllib.request.urlopen(request, timeout=30)  # which ends with the program
    wait_until(lambda: all(is_gone(worker) for worker in old), 2, "the old workers are gone")
    server.start_again()
    targets = [os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir()]
    assert not any("memfd:comfy-xdit" in target for target in targets), targets
    expected = stock_image(servers, tree, graph_of(850))
    assert_equal(expected, server.images(server.run(graph_of(850), DEADLINE_S)))
    assert_parallel(server)
    assert set(pids_of(server)).isdisjoint(old)
    assert all(log.exists() for log in logs), "of the program before: kept until the next"
    assert all(state_of(worker) == "" for worker in old), "they were waited for"
