"""Nothing of the workers reaches beyond this machine's loopback interface."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from rig import graphs
from rig.server import Server
from rig.sockets import InternetSocket, internet_sockets
from rig.trees import Tree

DEADLINE_S = 600.0

Servers = Callable[..., Server]


@pytest.mark.usefixtures("newest_only")
def test_workers_sockets_are_on_loopback_while_a_run_goes_on(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    """Seen by the kernel, so gloo's and the store's sockets count, which Python never sees."""
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_START_TIMEOUT="400")
    graph = graphs.with_values(graphs.load("ksampler_dev"), seed=300, size=(128, 128), steps=20)
    ranks.run(graphs.warm_up(graph, 1), DEADLINE_S)  # the ranks have connected to each other
    pids = [rank["pid"] for rank in ranks.status()["ranks"]]
    prompt = ranks.post_prompt(graph)
    seen: set[InternetSocket] = set()
    looked_while_running = 0
    while ranks.poll(prompt) is None:
        for pid in pids:
            seen |= internet_sockets(pid)
        looked_while_running += ranks.num_steps_done(prompt) > 0
        time.sleep(0.05)
    record_property("sockets", sorted(f"{s.table} {s.local} -> {s.remote}" for s in seen))
    run = ranks.status()["last_run"]
    assert run["steps_parallel"] == run["steps"] > 0, run
    assert looked_while_running > 0, "never looked while steps were made"
    assert any(s.remote for s in seen), "ranks over gloo hold connected sockets; none was found"
    assert {s for s in seen if not s.is_loopback} == set()
