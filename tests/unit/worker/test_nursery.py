"""The nursery and the ranks that it forks, as real processes; nothing of ComfyUI is imported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.host.pool.nursing import Nursery
from comfy_xdit_patch.wire.messages.requests import Start

DEADLINE_S = 60.0


@pytest.fixture
def nursery(tmp_path):
    made = Nursery(log_path=tmp_path / "nursery.log", environment=dict(os.environ), warm_up=None)
    yield made
    made.close()


@pytest.fixture
def gpu_nursery(tmp_path):
    """``gpu_nursery(source)``: one for GPU ranks, on a machine whose einops has that source."""
    made = []

    def make(source):
        (tmp_path / "einops.py").write_text(source)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        start = Start("", [], [], False, {}, None, 1, 1.0, 1.0)
        log_path = tmp_path / "nursery.log"
        made.append(Nursery(log_path=log_path, environment=environment, warm_up=start))
        return made[-1]

    yield make
    for each in made:
        each.close()


def fork(nursery, tmp_path, rank=0, **environment):
    """Return a rank that waits for its first message, and the host's end of its channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, open(tmp_path / f"rank-{rank}.log", "wb") as log_file:
        shared = [os.memfd_create(name) for name in ("store", "mailboxes")]
        fds = [theirs.fileno(), *shared, log_file.fileno()]
        end = time.monotonic() + DEADLINE_S
        process = nursery.fork(rank, {**os.environ, **environment}, fds, end=end)
        for fd in shared:
            os.close(fd)
    return process, ours


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid):
    end = time.monotonic() + DEADLINE_S
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_rank_is_a_child_of_the_nursery_and_lives_until_its_channel_closes(nursery, tmp_path):
    rank, channel = fork(nursery, tmp_path, rank=3)
    assert parent_of(rank.pid) == nursery.process.pid
    assert rank.poll() is None
    channel.close()
    assert rank.wait(DEADLINE_S) == 0
    log = (tmp_path / "rank-3.log").read_text()
    assert "[rank 3]" in log
    assert "the host is gone" in log


def test_a_rank_has_the_variables_that_it_is_given_and_no_others(tmp_path, monkeypatch):
    before = {"KEPT": "1", "CHANGED": "1", "GONE": "1"}
    made = Nursery(log_path=tmp_path / "nursery.log", environment=before, warm_up=None)
    sent = []
    monkeypatch.setattr(socket, "send_fds", lambda _, messages, fds: sent.extend(messages))
    with pytest.raises(WorkerError):
        made.fork(0, {"KEPT": "1", "CHANGED": "2", "NEW": "2"}, [], end=time.monotonic())
    changed = {"CHANGED": "2", "NEW": "2", "GONE": None, "OPENBLAS_NUM_THREADS": None}
    assert json.loads(sent[0]) == {"rank": 0, "variables": changed}


def test_a_rank_that_is_killed_is_told_by_its_signal_and_the_others_live(nursery, tmp_path):
    (first, _a), (second, _b) = (fork(nursery, tmp_path, rank=rank) for rank in range(2))
    first.kill()
    assert first.wait(DEADLINE_S) == -signal.SIGKILL
    assert second.poll() is None
    first.kill()  # It is gone, and that is no error.
    third, _c = fork(nursery, tmp_path, rank=2)
    assert third.poll() is None


def test_waiting_for_a_rank_that_lives_has_an_end(nursery, tmp_path):
    rank, _channel = fork(nursery, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(0.05)


def test_a_rank_shares_no_descriptor_of_another_one(nursery, tmp_path):
    ranks = [fork(nursery, tmp_path, rank=rank) for rank in range(3)]
    for process, _channel in ranks:
        end = time.monotonic() + DEADLINE_S
        while kinds_of_descriptors(process.pid) != ["memfd", "memfd", "socket"]:
            assert time.monotonic() < end, kinds_of_descriptors(process.pid)


def kinds_of_descriptors(pid):
    """Which of those that must not be shared a process has. It closes some after its fork."""
    kinds = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(fd).removeprefix("/").removeprefix("anon_inode:[")
            kinds += [kind for kind in ("socket", "memfd", "pidfd") if name.startswith(kind)]
    return sorted(kinds)


def test_ranks_end_with_their_nursery_and_it_makes_no_more(nursery, tmp_path):
    rank, _channel = fork(nursery, tmp_path)
    nursery.process.kill()
    assert rank.wait(DEADLINE_S) == -signal.SIGKILL
    wait_until_gone(nursery.process.pid)
    assert not nursery.is_alive
    with pytest.raises(WorkerError, match="nursery"):
        fork(nursery, tmp_path, rank=1)


def test_a_host_that_is_killed_leaves_nothing(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); "
        "import os, time; from pathlib import Path; import test_nursery as t; "
        "folder = Path(sys.argv[1]); "
        "made = t.Nursery(log_path=folder / 'n.log', environment=dict(os.environ), warm_up=None); "
        "rank, channel = t.fork(made, folder); "
        "print(made.process.pid, rank.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        pids = [int(word) for word in host.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        host.kill()
    for pid in pids:
        wait_until_gone(pid)


def test_nothing_is_imported_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    made = Nursery(log_path=tmp_path / "nursery.log", environment=dict(os.environ), warm_up=None)
    rank, _channel = fork(made, tmp_path)
    assert rank.poll() is None
    made.close()


def has_torch(pid):
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_gpu_ranks_find_torch_imported_and_no_gpu_opened(gpu_nursery, tmp_path):
    made = gpu_nursery("")
    rank, _channel = fork(made, tmp_path)
    assert has_torch(rank.pid)
    assert len(os.listdir(f"/proc/{made.process.pid}/task")) == 1
    opened = [os.readlink(fd) for fd in Path(f"/proc/{made.process.pid}/fd").iterdir()]
    assert not [name for name in opened if name.startswith("/dev/nvidia")]
    assert (tmp_path / "nursery.log").read_text() == ""


def test_where_an_import_leaves_a_thread_ranks_import_for_themselves(gpu_nursery, tmp_path):
    made = gpu_nursery(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    )
    first, _a = fork(made, tmp_path, rank=0)
    second, _b = fork(made, tmp_path, rank=1)
    for rank in (first, second):
        assert parent_of(rank.pid) == made.process.pid
        assert not has_torch(rank.pid)
    assert "an import left 2 threads" in (tmp_path / "nursery.log").read_text()
    first.kill()
    assert first.wait(DEADLINE_S) == -signal.SIGKILL
    assert second.poll() is None


def test_a_thread_that_comes_later_costs_no_rank_that_lives(gpu_nursery, tmp_path):
    made = gpu_nursery(
        "import os, signal, threading, time\n"
        "start = lambda *_: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
        "signal.signal(signal.SIGUSR2, start)"
    )
    first, _a = fork(made, tmp_path, rank=0)
    made.process.send_signal(signal.SIGUSR2)
    end = time.monotonic() + DEADLINE_S
    while len(os.listdir(f"/proc/{made.process.pid}/task")) == 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    second, channel = fork(made, tmp_path, rank=1)
    assert has_torch(first.pid)
    assert not has_torch(second.pid)
    assert first.poll() is None
    first.kill()
    assert first.wait(DEADLINE_S) == -signal.SIGKILL, "who reaps it has not forgotten it"
    channel.close()
    assert second.wait(DEADLINE_S) == 0


def test_a_nursery_that_ends_while_it_imports_is_told_with_its_log(gpu_nursery, tmp_path):
    made = gpu_nursery("import os; os.write(2, b'not today'); os._exit(7)")
    with pytest.raises(WorkerError, match=r"made no rank 0.*\n.*not today"):
        fork(made, tmp_path)


def test_a_nursery_that_does_not_answer_is_ended_at_the_deadline(nursery, tmp_path, monkeypatch):
    first, _channel = fork(nursery, tmp_path)
    nursery.process.send_signal(signal.SIGSTOP)
    monkeypatch.setitem(globals(), "DEADLINE_S", 0.5)
    with pytest.raises(WorkerError, match="made no rank 1"):
        fork(nursery, tmp_path, rank=1)
    assert not nursery.is_alive
    assert first.wait(5) == -signal.SIGKILL
