"""Nothing of the workers reaches beyond this machine's loopback interface."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import graphs
from rig.server import Server
from rig.sockets import InternetSocket, internet_sockets
from rig.trees import Tree

DEADLINE_S = 600.0

Servers = Callable[..., Server]


@pytest.mark.newest_only
def test_workers_sockets_are_on_loopback_while_a_run_goes_on(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    """Seen by the kernel, so gloo's and the store's sockets count, which Python never sees."""
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_STRICT="1", XDIT_START_TIMEOUT="400")
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


# Runs in a network namespace of its own: nothing but a loopback interface exists there.
IN_NAMESPACE = """
import fcntl, json, socket, struct, sys
from pathlib import Path
with socket.socket() as s:  # bring lo up: SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
with socket.socket() as s:
    try:
        s.connect(("192.0.2.1", 80))
    except OSError as error:
        refused = str(error)
sys.path.insert(0, sys.argv[1])
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.server import Server, base_directory
from rig.trees import trees_for_tests
tree = next(t for t in trees_for_tests() if t.version == sys.argv[2])
graph = graphs.with_values(graphs.load("ksampler_dev"), seed=301, size=(128, 128), steps=2)
env = {"XDIT_GPUS": "cpu:2", "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
models = models_directory(Sizes(hidden=512, variants=True))
with (
    base_directory(Path(sys.argv[3]), models) as base,
    Server(tree, base, env=env, is_cold=True) as server,
):
    server.run(graph, 600)
    print(json.dumps({"refused": refused, "run": server.status()["last_run"]}))
"""


@pytest.mark.newest_only
@pytest.mark.slow  # a server and a pool of its own, for no other can be inside
def test_everything_runs_where_only_loopback_exists(tree: Tree, tmp_path: Path) -> None:
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--net"]
    allowed = subprocess.run([*unshare, "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"this system allows no network namespace: {allowed.stderr.decode().strip()}")
    tests = str(Path(__file__).parents[1])
    command = [*unshare, sys.executable, "-c", IN_NAMESPACE, tests, tree.version, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "unreachable" in answer["refused"]
    assert answer["run"]["steps_parallel"] == answer["run"]["steps"] == 2
