"""What docs/security.md says, looked at in a running server: doors, names, files, and prompts."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig import graphs
from rig.server import Server
from rig.sockets import internet_sockets
from rig.trees import trees_for_tests

import comfy_xdit_patch

DEADLINE_S = 600.0
WORD = "quokkaharbour"
# Where ComfyUI itself writes; "user" holds its own log and settings.
COMFYUI_FOLDERS = ("output", "temp", "user", "input", "custom_nodes")
PACKAGE = Path(comfy_xdit_patch.__file__).parent

Servers = Callable[..., Server]
Listing = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Running:
    """A server that has made an image, and what lay on the disk before it started."""

    server: Server
    pids: list[int]
    home: Path
    temporary: Path
    before: dict[Path, Listing]

    @property
    def all_pids(self) -> list[int]:
        assert self.server.process is not None
        return [self.server.process.pid, *self.pids]

    @property
    def logs(self) -> list[Path]:
        return [Path(rank["log"]) for rank in self.server.status()["ranks"]]


@pytest.fixture(scope="module")
def running(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with two ranks, and a home and a temporary directory that nobody else uses."""
    tree = trees_for_tests()[-1]
    home, temporary = (tmp_path_factory.mktemp(name) for name in ("home", "temporary"))
    watched = (home, tree.path, PACKAGE)
    before = {path: listing(path) for path in watched}
    env = {"HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": ""}
    env |= {"XDIT_GPUS": "cpu:2", "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
    server = servers(tree, hidden=256, variants=False, **env)
    server.run(graph(), DEADLINE_S)
    pids = [rank["pid"] for rank in server.status()["ranks"]]
    yield Running(server, pids, home, temporary, before)
    server.stop()  # nobody else wants this home


def graph(seed: int = 700) -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    prompt = f"a {WORD} by the sea"
    return graphs.with_values(graph, seed=seed, size=(128, 128), steps=2, prompt=prompt)


def listing(folder: Path) -> Listing:
    """Every file below a folder, with size and time of change; Python's own caches apart."""
    return {
        str(path.relative_to(folder)): (status.st_size, status.st_mtime_ns)
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts and stat.S_ISREG((status := path.lstat()).st_mode)
    }


def test_only_comfyuis_own_port_listens_and_only_on_loopback(running: Running) -> None:
    for pid in running.all_pids:
        sockets = internet_sockets(pid)
        assert {s for s in sockets if not s.is_loopback} == set()
        listening = {s.port for s in sockets if s.is_listening}
        if pid not in running.pids:
            assert listening == {int(running.server.url.rsplit(":", 1)[1])}
        else:
            assert listening, "gloo listens; if it no longer does, docs/security.md is out of date"


def test_a_stranger_on_this_machine_cannot_connect_to_a_rank(running: Running) -> None:
    """Gloo would take every connection, keep its descriptor, and end when it has no more."""
    (before,) = running.server.images(running.server.run(graph(701), DEADLINE_S))
    for pid in running.pids:
        num_fds = len(os.listdir(f"/proc/{pid}/fd"))
        for port in {s.port for s in internet_sockets(pid) if s.is_listening}:
            with pytest.raises(TimeoutError):
                socket.create_connection(("127.0.0.1", port), timeout=0.3)
        assert len(os.listdir(f"/proc/{pid}/fd")) == num_fds
    running.server.free()  # so that the next image is computed, not remembered
    (after,) = running.server.images(running.server.run(graph(702), DEADLINE_S))
    assert not (before == after).all()
    assert running.server.status()["last_run"]["steps_parallel"] == 2
    assert [rank["pid"] for rank in running.server.status()["ranks"]] == running.pids


def test_channels_and_shared_memory_have_no_name(running: Running) -> None:
    channels = 0
    for pid in running.all_pids:
        targets = [os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir()]
        inodes = {t[len("socket:[") : -1] for t in targets if t.startswith("socket:")}
        rows = [row.split() for row in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
        ours = [row for row in rows if row[6] in inodes]
        assert [row for row in ours if len(row) > 7] == [], "a path or an abstract name"
        channels += len(ours)
        mapped = Path(f"/proc/{pid}/maps").read_text()
        names = [row for row in mapped.splitlines() if "/dev/shm/" in row]
        assert [row for row in names if not row.endswith(" (deleted)")] == []
        assert "/memfd:comfy-xdit-slot (deleted)" in mapped
        assert not any(target.startswith("/dev/shm/") for target in targets)
    assert channels >= 2 * len(running.pids)


def test_logs_of_workers_are_private(running: Running) -> None:
    for log in running.logs:
        assert log.parent.parent == running.temporary
        assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert log.stat().st_size > 0


def test_nothing_is_written_but_logs_and_what_comfyui_writes(running: Running) -> None:
    for folder, before in running.before.items():
        assert listing(folder) == before, folder
    logs = {str(log.relative_to(running.temporary)) for log in running.logs}
    assert set(listing(running.temporary)) == logs
    base = running.server.base_dir
    written = {Path(name).parts[0] for name in listing(base)}
    assert written <= {*COMFYUI_FOLDERS, "front-end", "server.log"}


def test_prompts_are_in_no_log_and_in_no_environment(running: Running) -> None:
    assert "quokka" in WORD
    texts = {str(log): log.read_bytes() for log in running.logs}
    texts["server.log"] = running.server.log_path.read_bytes()
    for pid in running.pids:
        for name in ("environ", "cmdline"):
            texts[f"{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    assert all(texts.values()), "each was read"
    assert [name for name, text in texts.items() if WORD.encode() in text] == []
    status = str(running.server.status())
    assert WORD not in status


def test_an_error_in_a_step_tells_no_prompt(running: Running) -> None:
    """A worker dies in mid-step: log tails and tracebacks reach ComfyUI's log."""
    stopped = running.server.post_prompt(graphs.with_values(graph(703), steps=30))
    while running.server.num_steps_done(stopped) < 1:
        time.sleep(0.01)
    os.kill(running.pids[0], 11)
    with contextlib.suppress(Exception):  # strict: the step is an error
        running.server.wait(stopped, DEADLINE_S)
    log = running.server.log_text()
    assert "Rank 0 (pid" in log
    assert WORD not in log
