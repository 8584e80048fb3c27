"""What docs/security.md says, looked at in a running server: doors, names, files, and prompts."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import graphs
from rig.faults import children
from rig.lone import LoneServer, listing
from rig.sockets import internet_sockets

pytestmark = [
    pytest.mark.newest_only,
    # The tests of test_neighbours.py need the lone server that these end: side by side by version.
    pytest.mark.usefixtures("tree"),
]

DEADLINE_S = 600.0
WORD = "quokkaharbour"
# Where ComfyUI itself writes; "user" holds its own log and settings.
COMFYUI_FOLDERS = ("output", "temp", "user", "input", "custom_nodes")


class Running:
    """A server that has made an image."""

    def __init__(self, lone: LoneServer) -> None:
        self.server = lone()
        self.server.run(graph(), DEADLINE_S)
        self.home, self.temporary, self.before = lone.home, lone.temporary, lone.before
        status = self.server.status()
        assert status["last_run"]["steps_parallel"] == 2
        self.pids = [rank["pid"] for rank in status["ranks"]]
        self.logs = [Path(rank["log"]) for rank in status["ranks"]]
        assert self.server.process is not None
        self.all_pids = [self.server.process.pid, *self.pids]


_running: list[Running] = []


@pytest.fixture(scope="module")
def _lone_until_the_end(lone: LoneServer) -> Iterator[None]:
    yield
    lone.stop()


@pytest.fixture
def running(lone: LoneServer, _lone_until_the_end: None) -> Running:
    if not _running:
        _running.append(Running(lone))
    return _running[0]


def graph(seed: int = 700) -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    prompt = f"a {WORD} by the sea"
    return graphs.with_values(graph, seed=seed, size=(128, 128), steps=2, prompt=prompt)


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
        for file in log.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
        assert log.stat().st_size > 0


def test_nothing_is_written_but_logs_and_what_comfyui_writes(running: Running) -> None:
    for folder, before in running.before.items():
        assert listing(folder) == before, folder
    logs = {str(log.relative_to(running.temporary)) for log in running.logs}
    folder = running.logs[0].parent.name
    (nursery,) = children(running.server.process.pid)  # type: ignore[union-attr]
    of_host = {f"{folder}/{name}" for name in ("lock", "nursery.log", f"{nursery}.pid")}
    found = set(listing(running.temporary))
    of_host_before = {path for path in found if not path.startswith(f"{folder}/")}
    assert found - of_host_before == logs | of_host
    assert len({Path(path).parts[0] for path in of_host_before}) <= 1
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
    running.server.wait_for_steps(stopped, 1, DEADLINE_S)
    os.kill(running.pids[0], 11)
    with contextlib.suppress(Exception):  # strict: the step is an error
        running.server.wait(stopped, DEADLINE_S)
    log = running.server.log_text()
    assert "Rank 0 (pid" in log
    assert WORD not in log
