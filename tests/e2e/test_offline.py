"""Nothing of the workers reaches beyond this machine's loopback interface and a server's volume."""

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
from rig.checkpoints import Sizes, models_directory
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


# Runs in namespaces of its own: nothing but a loopback interface exists there, and only the base
# directory can be written, as in a container with a read-only root and a volume.
IN_NAMESPACE = """
import fcntl, json, os, socket, struct, sys
from pathlib import Path
with socket.socket() as s:  # bring lo up: SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
with socket.socket() as s:
    try:
        s.connect(("192.0.2.1", 80))
    except OSError as error:
        refused = str(error)
try:
    Path("/anything").touch()
except OSError as error:
    read_only = str(error)
os.environ.pop("HOME", None)
sys.path.insert(0, sys.argv[1])
from rig import graphs
from rig.server import Server, base_directory
from rig.trees import Tree
tree, models, base = Tree(sys.argv[2], Path(sys.argv[3])), Path(sys.argv[4]), Path(sys.argv[5])
graph = graphs.with_values(graphs.load("ksampler_dev"), seed=301, size=(128, 128), steps=2)
env = {"XDIT_GPUS": "cpu:2", "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
env |= {"XDIT_LOG_DIR": str(base / "logs"), "XDG_CACHE_HOME": "/not-there"}
env["TMPDIR"] = str(base)  # torch needs one to be imported
with (
    base_directory(base, models, keep=True),
    Server(tree, base, env=env, is_cold=True) as server,
):
    server.run(graph, 600)
    answer = {"refused": refused, "read_only": read_only, "run": server.status()["last_run"]}
print(json.dumps(answer))
"""
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && exec "$@"'


@pytest.mark.newest_only
@pytest.mark.slow  # a server and a pool of its own, for no other can be inside
def test_everything_runs_where_only_loopback_exists_and_only_a_volume_can_be_written(
    tree: Tree, tmp_path: Path
) -> None:
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--net"]
    unshare += ["--mount", "sh", "-c", READ_ONLY, str(tmp_path)]
    allowed = subprocess.run([*unshare, "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"this system allows no such namespaces: {allowed.stderr.decode().strip()}")
    models = models_directory(Sizes(hidden=512, variants=True))
    command = [*unshare, sys.executable, "-c", IN_NAMESPACE, str(Path(__file__).parents[1])]
    command += [tree.version, str(tree.path), str(models), str(tmp_path)]
    done = subprocess.run(
        command, cwd="/", capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "unreachable" in answer["refused"]
    assert "Read-only file system" in answer["read_only"]
    assert answer["run"]["steps_parallel"] == answer["run"]["steps"] == 2
    assert list(tmp_path.glob("logs/*/worker-1.log"))
