"""Status, metrics and the doctor of a real server, from its first image to a lost rank's return."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed
from rig import graphs
from rig.judgement import wrong_of
from rig.server import Server
from rig.trees import Tree

DEADLINE_S = 120.0
STEPS = 30
Sample = tuple[str, tuple[tuple[str, str], ...]]


def graph_of(seed: int, steps: int) -> graphs.Graph:
    return graphs.with_values(graphs.load("ksampler_dev"), seed=seed, size=(128, 128), steps=steps)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        return str(answer.read().decode())


def counters(server: Server) -> dict[Sample, float]:
    """Every sample of a counter that the server shows."""
    families = list(parsed(get(f"{server.url}/xdit/metrics")))
    assert len(families) > 20
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        if family.type == "counter"
        for sample in family.samples
    }


@pytest.mark.newest_only
def test_a_server_says_what_it_does_and_counts_on_over_a_lost_rank(
    servers: Callable[..., Server], tree: Tree
) -> None:
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="397")
    ranks.run(graph_of(300, steps=2), DEADLINE_S)
    status = ranks.status()
    assert (status["state"], status["run"]) == ("ready", None)
    assert status["settings"]["XDIT_GPUS"] == "cpu:2"
    assert status["plan"]["degrees"]["ulysses"] == status["plan"]["world_size"] == 2
    assert status["plan"]["why"] == "XDIT_STRATEGY=ulysses"
    for rank in status["ranks"]:
        memory = rank["memory"]
        assert 50 << 20 < memory["used_bytes"] < memory["total_bytes"]
        assert rank["uptime_s"] > 0
        assert rank["forwards"] >= 2
    assert wrong_of(ranks, "state: ready", "rank 1: cpu cpu, ready") == []
    before, restarts = counters(ranks), status["ranks"][0]["restarts"]
    busy = [rank["busy_total_s"] for rank in status["ranks"]]

    prompt = ranks.post_prompt(graph_of(301, steps=STEPS))
    ranks.wait_for_steps(prompt, 3, DEADLINE_S)
    status = ranks.status()
    assert status["state"] == "computing"
    assert 0 < status["run"]["step"] < status["run"]["steps"] == STEPS
    assert 0 < status["run"]["calls"] < STEPS
    assert 0 < time.time() - status["run"]["since_unix_s"] < DEADLINE_S
    assert all(0 < rank["busy_share"] <= 1 for rank in status["ranks"])
    assert all(old < rank["busy_total_s"] for old, rank in zip(busy, status["ranks"], strict=True))
    os.kill(status["ranks"][1]["pid"], signal.SIGKILL)
    ranks.wait(prompt, DEADLINE_S)
    status = ranks.status()
    assert status["fell_back"][-1]["reason"] == "a worker was lost"
    assert status["fell_back"][-1]["remedy"].startswith("Look `last_error` up")
    assert time.time() - status["last_error"]["unix_s"] < DEADLINE_S

    end = time.monotonic() + DEADLINE_S
    while ranks.status()["state"] != "ready":
        assert time.monotonic() < end, ranks.status()
        time.sleep(0.2)
    ranks.run(graph_of(302, steps=2), DEADLINE_S)
    status = ranks.status()
    assert [rank["restarts"] for rank in status["ranks"]] == [restarts + 1] * 2
    assert [rank["forwards"] for rank in status["ranks"]] == [2, 2]
    after = counters(ranks)
    assert after.keys() >= before.keys(), "a counter disappeared"
    assert [name for name, value in before.items() if after[name] < value] == []
    assert after["xdit_losses_total", ()] == before["xdit_losses_total", ()] + 1
    assert wrong_of(ranks, "fell back", "a worker was lost") == []


def own_address() -> str | None:
    """This machine's address in its network; None where it has loopback only."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # Nothing is sent.
        except OSError:
            return None
        return str(probe.getsockname()[0])


@pytest.mark.newest_only
@pytest.mark.thorough  # Each answer has a unit test over HTTP; here ComfyUI says who asks.
def test_who_does_not_ask_over_loopback_is_told_counts_only(
    servers: Callable[..., Server], tree: Tree
) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no network")
    ranks = servers(tree, XDIT_GPUS="cpu:2", extra_args=("--listen", "0.0.0.0"))
    url = ranks.url.replace("127.0.0.1", address)
    short = json.loads(get(f"{url}/xdit/status"))
    assert short.keys() >= {"schema", "version", "state", "num_ranks"}
    assert len(short) == 6
    assert "xdit_rank_" not in get(f"{url}/xdit/metrics")
    ranks.have({**ranks.env, "XDIT_STATUS": "all"})
    assert "settings" in json.loads(get(f"{url}/api/xdit/status"))
