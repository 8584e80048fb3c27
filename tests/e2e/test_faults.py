"""A worker lost, a worker that cannot start, bad settings: the image is always stock ComfyUI's."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rig import graphs, weight_graphs
from rig.compare import compare_all
from rig.faults import Fault, Orders, is_running
from rig.judgement import wrong_of
from rig.server import Server
from rig.trees import Tree
from rig.weight_rows import KOHYA

DEADLINE_S = 600.0
SIZE = (192, 192)

Servers = Callable[..., Server]


@pytest.fixture
def servers(servers: Servers, orders: Orders) -> Servers:
    """Those of the whole group, in which faults can be ordered."""

    def server(tree: Tree, **env: str) -> Server:
        if env.get("XDIT_GPUS", "").startswith("cpu:"):
            env["RIG_FAULTS"] = str(orders.path)
        return servers(tree, **env)

    return server


def graph_of(seed: int, steps: int = 6) -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=seed, size=SIZE, steps=steps, save_latent=True)


def assert_equal_to_stock(servers: Servers, tree: Tree, ranks: Server, seed: int) -> None:
    graph = graph_of(seed)
    stock = servers(tree, XDIT_STRATEGY="off")
    expected = stock.images(stock.run(graph, DEADLINE_S))
    difference = compare_all(expected, ranks.images(ranks.run(graph, DEADLINE_S)))
    assert difference.is_equal, str(difference)


def wait_for_state(server: Server, state: str, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while server.status()["state"] != state:
        assert time.monotonic() < end, server.status()
        time.sleep(0.2)


@pytest.mark.newest_only
def test_a_worker_killed_in_mid_step_costs_no_image(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    victim = 1
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="400")
    assert_equal_to_stock(servers, tree, ranks, seed=100)  # warm, and parallel:
    assert ranks.status()["last_run"]["steps_parallel"] == 6
    graph = graph_of(seed=101 + victim)
    stock = servers(tree, XDIT_STRATEGY="off")
    expected = stock.images(stock.run(graph, DEADLINE_S))

    prompt = ranks.post_prompt(graph)
    ranks.wait_for_steps(prompt, 2, DEADLINE_S)
    pids = [rank["pid"] for rank in ranks.status()["ranks"]]
    log_dir = Path(ranks.status()["ranks"][victim]["log"]).parent
    shutil.rmtree(log_dir)  # as programs do that clean /tmp
    killed_at = time.time()
    os.kill(pids[victim], signal.SIGKILL)
    history = ranks.wait(prompt, DEADLINE_S)

    difference = compare_all(expected, ranks.images(history))
    assert difference.is_equal, str(difference)
    status = ranks.status()
    run = status["last_run"]
    assert 0 < run["steps_parallel"] < 6
    assert run["fall_back_reasons"] == {"a worker was lost": 6 - run["steps_parallel"]}
    assert f"Rank {victim} " in status["last_error"]["text"]
    assert "signal 9" in status["last_error"]["text"]
    delay_s = status["last_loss_unix_s"] - killed_at
    record_property("seconds from death to the re-run in the host", delay_s)
    assert 0 < delay_s < 1.0
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists(), "half a world is left"

    wait_for_state(ranks, "ready", 400)
    assert [rank["weight_bytes"] for rank in ranks.status()["ranks"]] == [None, None]
    assert all(Path(rank["log"]).exists() for rank in ranks.status()["ranks"])
    assert_equal_to_stock(servers, tree, ranks, seed=110 + victim)
    assert ranks.status()["last_run"]["steps_parallel"] == 6, "the next image is parallel again"


@pytest.mark.newest_only
def test_hooks_that_comfyui_did_without_are_made_up_for_when_a_worker_is_lost(
    servers: Servers, tree: Tree
) -> None:
    """While the workers run a model, hooks are not written into ComfyUI's own copy of it."""
    graph = graph_of(seed=115)
    graph["8"]["inputs"]["cfg"] = 3.0
    graph = weight_graphs.with_hooked_lora(graph, KOHYA, on=("positive",))
    stock = servers(tree, XDIT_STRATEGY="off")
    expected = stock.images(stock.run(graph, DEADLINE_S))
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="400")
    difference = compare_all(expected, ranks.images(ranks.run(graph, DEADLINE_S)))
    assert difference.is_equal, str(difference)
    num_calls = ranks.status()["last_run"]["steps_parallel"]
    assert num_calls == 12

    graph["8"]["inputs"]["seed"] = 116
    expected = stock.images(stock.run(graph, DEADLINE_S))
    prompt = ranks.post_prompt(graph)
    ranks.wait_for_steps(prompt, 2, DEADLINE_S)
    os.kill(ranks.status()["ranks"][1]["pid"], signal.SIGKILL)
    difference = compare_all(expected, ranks.images(ranks.wait(prompt, DEADLINE_S)))
    assert difference.is_equal, str(difference)
    run = ranks.status()["last_run"]
    assert 0 < run["steps_parallel"] < num_calls
    wait_for_state(ranks, "ready", 400)


@pytest.mark.thorough  # test_endurance.py cancels three, at moments of chance.
def test_a_cancelled_prompt_leaves_nobody_stranded(servers: Servers, tree: Tree) -> None:
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="400")
    assert_equal_to_stock(servers, tree, ranks, seed=120)
    pids = [rank["pid"] for rank in ranks.status()["ranks"]]
    for seed in range(121, 124):
        prompt = ranks.post_prompt(graph_of(seed, steps=50))
        ranks.wait_for_steps(prompt, 2, DEADLINE_S)
        ranks.interrupt()
        with pytest.raises(InterruptedError):
            ranks.wait(prompt, 30)
    assert_equal_to_stock(servers, tree, ranks, seed=125)
    status = ranks.status()
    assert status["last_run"]["steps_parallel"] == 6
    assert [rank["pid"] for rank in status["ranks"]] == pids, "no worker was lost by it"


def test_free_reaches_the_workers_and_the_next_image_is_parallel(
    servers: Servers, tree: Tree
) -> None:
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="400")
    assert_equal_to_stock(servers, tree, ranks, seed=130)
    before = [_resident_bytes(rank["pid"]) for rank in ranks.status()["ranks"]]
    ranks.free()
    end = time.monotonic() + 30
    while True:  # ComfyUI frees in its own time, in the prompt thread.
        after = [_resident_bytes(rank["pid"]) for rank in ranks.status()["ranks"]]
        if all(b - a > 50 << 20 for a, b in zip(after, before, strict=True)):
            break
        assert time.monotonic() < end, (before, after)
        time.sleep(0.2)
    assert_equal_to_stock(servers, tree, ranks, seed=131)
    assert ranks.status()["last_run"]["steps_parallel"] == 6


def _resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.newest_only
def test_a_worker_that_cannot_start_is_named_and_the_image_is_stock(
    servers: Servers, tree: Tree, orders: Orders
) -> None:
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="399")
    for rank in range(2):
        (orders.path / f"import.{rank}").write_text("exception")
    started = time.monotonic()
    assert_equal_to_stock(servers, tree, ranks, seed=140)
    assert time.monotonic() - started < 400
    status = ranks.status()
    assert status["state"] == "broken"
    assert status["last_run"]["fall_back_reasons"] == {"the workers did not start": 6}
    for text in ("Rank ", "failed in import of ComfyUI", "RuntimeError: planted"):
        assert text in status["reason"]
        assert text in ranks.log_text()
    assert ranks.texts[-1][1] == "xDiT: the workers did not start"
    (wrong,) = wrong_of(ranks, "fell back 6 times: the workers did not start")
    assert wrong.startswith("state: broken, The workers did not start. Rank ")
    # A second image does not wait for a second attempt.
    started = time.monotonic()
    assert_equal_to_stock(servers, tree, ranks, seed=141)
    assert time.monotonic() - started < 30
    orders.withdraw()


@pytest.mark.newest_only
def test_a_start_that_takes_too_long_names_the_missing_ranks(
    servers: Servers, tree: Tree, orders: Orders
) -> None:
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="398")
    assert_equal_to_stock(servers, tree, ranks, seed=149)  # All is imported now.
    orders.give(Fault("join", "hang", 0))
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="2")
    assert_equal_to_stock(servers, tree, ranks, seed=150)
    reason = ranks.status()["reason"]
    assert "rank 0, rank 1 did not join within XDIT_START_TIMEOUT=2 s" in reason


@pytest.mark.newest_only
@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"XDIT_GPUS": "cpu:2", "XDIT_STRATEGY": "ring=3"},
            'XDIT_STRATEGY="ring=3" does not fit 2',
        ),
        # These texts have unit tests; a server shows that they come to its log as the first does.
        pytest.param(
            {"XDIT_GPUS": "7,8"},
            "XDIT_GPUS asks for GPU 7,8, but ComfyUI's process sees 0 GPUs",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"XDIT_GPUS": "all"},
            "xDiT: not active: no usable GPU is visible",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_bad_settings_leave_stock_comfyui_and_one_clear_line(
    servers: Servers, tree: Tree, variables: dict[str, str], text: str
) -> None:
    ranks = servers(tree, RIG_OWN="wrong settings", **variables)
    lines = [line for line in ranks.log_text().splitlines() if "xDiT" in line]
    assert len(lines) == 1
    assert text in lines[0]
    assert_equal_to_stock(servers, tree, ranks, seed=160)
    is_off = "not active" in text
    assert ranks.status()["state"] == ("off" if is_off else "refused")
    assert len(wrong_of(ranks, text.removeprefix("xDiT: not active: "))) == (not is_off)


@pytest.mark.newest_only
def test_what_is_misspelt_or_useless_is_told_and_all_goes_on(servers: Servers, tree: Tree) -> None:
    misspelt = {"XDIT_STRATGY": "ring", "XDIT_LOGGING_LEVEL": "WARNING"}  # The second is xfuser's.
    ranks = servers(tree, XDIT_GPUS="cpu:1", XDIT_START_TIMEOUT="400", **misspelt)
    told = [line.split("xDiT: ")[1] for line in ranks.log_text().splitlines() if "xDiT: " in line]
    assert told == [
        "XDIT_STRATGY is not a setting of ours and has no effect. Did you mean XDIT_STRATEGY?",
        "active on 1 CPU rank, strategy ulysses.",
        "one rank makes no image faster; XDIT_GPUS names a single device.",
    ]
    assert_equal_to_stock(servers, tree, ranks, seed=165)
    assert ranks.status()["last_run"]["steps_parallel"] == 6


@pytest.mark.newest_only
@pytest.mark.thorough
@pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled")
@pytest.mark.parametrize(
    ("gpus", "text"),
    [
        ("all", "not active: ComfyUI computes on cpu, and ranks would on GPUs."),
        ("0,1", "XDIT_GPUS names GPUs, and ComfyUI computes on cpu. ComfyUI goes on alone."),
    ],
)
def test_gpus_are_nothing_for_a_comfyui_on_the_cpu(
    servers: Servers, tree: Tree, gpus: str, text: str
) -> None:
    cards = {"device": "emulated", "EMULATED_CARDS": "4090,4090", "node_packs": ()}
    ranks = servers(tree, XDIT_GPUS=gpus, extra_args=("--cpu",), **cards)
    told = [line.split("xDiT: ")[1] for line in ranks.log_text().splitlines() if "xDiT: " in line]
    assert told == [text]
    assert ranks.status()["state"] == ("off" if "not active" in text else "refused")


@pytest.mark.newest_only
@pytest.mark.thorough
@pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled")
def test_one_gpu_has_nothing_to_share_which_is_no_fault(servers: Servers, tree: Tree) -> None:
    cards = {"device": "emulated", "EMULATED_CARDS": "4090", "node_packs": ()}
    ranks = servers(tree, XDIT_GPUS="all", **cards)
    status = ranks.status()
    assert (status["state"], status["ranks"]) == ("off", [])
    assert wrong_of(ranks, "state: off, one GPU is visible, nothing to share") == []


def test_strict_turns_a_fall_back_into_an_error(servers: Servers, tree: Tree) -> None:
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_STRICT="1", XDIT_START_TIMEOUT="400")
    # One image token for two ranks: refused by the plan, before any worker is needed.
    graph = graphs.with_values(graph_of(seed=170), size=(16, 16))
    with pytest.raises(Exception, match="XDIT_STRICT=1, and this step cannot run in parallel"):
        ranks.run(graph, DEADLINE_S)


@pytest.mark.newest_only
def test_nothing_is_left_when_the_server_is_killed(servers: Servers, tree: Tree) -> None:
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="400", XDIT_STEP_TIMEOUT="599")
    assert_equal_to_stock(servers, tree, ranks, seed=180)
    pids = [rank["pid"] for rank in ranks.status()["ranks"]]
    shared_before = set(os.listdir("/dev/shm"))
    prompt = ranks.post_prompt(graph_of(181, steps=50))
    ranks.wait_for_steps(prompt, 2, DEADLINE_S)
    assert ranks.process is not None
    os.kill(ranks.process.pid, signal.SIGKILL)
    end = time.monotonic() + 2.0
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert set(os.listdir("/dev/shm")) <= shared_before


def test_images_are_not_flat(servers: Servers, tree: Tree) -> None:
    stock = servers(tree, XDIT_STRATEGY="off")
    (image,) = stock.images(stock.run(graph_of(seed=190), DEADLINE_S))
    assert np.asarray(image).std() > 5
