"""Worker processes, with real processes where one is needed."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

from comfy_xdit_patch.errors import ChannelClosedError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool.inheritance import worker_variables
from comfy_xdit_patch.host.pool.launcher import Worker, end_workers, launch_worker
from comfy_xdit_patch.host.pool.log_files import TAIL_LINES
from comfy_xdit_patch.host.pool.nursing import Nursery
from comfy_xdit_patch.wire.channel import Channel
from comfy_xdit_patch.wire.messages.replies import Failed
from comfy_xdit_patch.wire.messages.requests import Stop

CPU = Device(name="cpu")


@pytest.fixture
def worker(tmp_path):
    """``worker(code)``: a process of a bare Python in a worker's place."""
    started = []

    def make(code, log=""):
        ours, theirs = socket.socketpair()
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code])
        theirs.close()
        (tmp_path / "worker-0.log").write_text(log)
        started.append(Worker(0, CPU, process, Channel(ours), tmp_path / "worker-0.log"))
        return started[-1]

    yield make
    for each in started:
        each.process.kill()
        each.process.wait()
        each.channel.close()


def test_a_living_worker_is_alive(worker):
    assert worker("import time; time.sleep(60)").exit_text() == "is alive"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("pass", "ended with exit code 0"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
    ],
)
def test_the_end_of_a_worker_is_told_in_words(worker, code, text):
    ended = worker(code)
    ended.process.wait(10)
    assert ended.exit_text() == text


def test_the_last_lines_of_a_log_are_quoted(worker):
    lines = [f"line {n}" for n in range(TAIL_LINES + 5)]
    tail = worker("pass", "\n".join(lines)).log_tail()
    assert tail.split("\n") == [f"    {line}" for line in lines[5:]]


def test_an_empty_or_a_missing_log_is_told(worker):
    ended = worker("pass")
    assert ended.log_tail() == "    (its log is empty)"
    ended.log_path.unlink()
    assert ended.log_tail().startswith("(no log: ")


def test_bytes_in_a_log_that_are_no_text_do_not_hide_the_rest(worker):
    ended = worker("pass")
    ended.log_path.write_bytes(b"\xff\xfe before\nafter\n")
    assert ended.log_tail().endswith("    after")


def test_a_worker_that_ends_by_itself_is_waited_for(worker):
    ending = worker("raise SystemExit(5)")
    end_workers([ending], grace_s=10)
    assert ending.process.returncode == 5


def test_a_worker_that_does_not_end_is_killed_after_the_grace(worker):
    stubborn = worker("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    start = time.monotonic()
    end_workers([stubborn], grace_s=0.1)
    assert stubborn.process.returncode == -signal.SIGKILL
    assert time.monotonic() - start < 5
    assert stubborn.channel.fileno() == -1


def test_the_grace_is_one_for_all_workers(worker):
    stubborn = [worker("import time; time.sleep(60)") for _ in range(4)]
    start = time.monotonic()
    end_workers(stubborn, grace_s=1.0)
    assert time.monotonic() - start < 3
    assert {w.process.returncode for w in stubborn} == {-signal.SIGKILL}


# Whoever traces a process takes its end in the parent's place: to the parent, it does not end.
TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(ctypes.c_long(0x4206), int(sys.argv[1]), None, None):  # PTRACE_SEIZE
    raise SystemExit(f"ptrace: error {ctypes.get_errno()}")
print("traced", flush=True)
sys.stdin.read()
"""


def test_a_process_that_cannot_be_killed_is_left_behind_and_named(worker, monkeypatch, caplog):
    monkeypatch.setattr("comfy_xdit_patch.host.pool.launcher.KILL_S", 0.5)
    undying = worker("import time; time.sleep(60)")
    command = [sys.executable, "-c", TRACER, str(undying.process.pid)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as tracer:
        if tracer.stdout.readline() != "traced\n":
            pytest.skip(f"this system allows no tracing: {tracer.stderr.read()}")
        start = time.monotonic()
        end_workers([undying], grace_s=0)
        assert time.monotonic() - start < 5
        assert undying.process.returncode is None
        assert (
            f"(pid {undying.process.pid}, cpu) does not end although it was killed" in caplog.text
        )
        tracer.communicate()
    assert undying.process.wait(10) == -signal.SIGKILL


@pytest.fixture
def launched(tmp_path):
    """Return a real worker process that waits for its first message."""
    environment = worker_variables(CPU, cpu_threads=1)
    nursery = Nursery(log_path=tmp_path / "nursery.log", environment=environment, warm_up=None)
    shared_fds = [os.memfd_create(name) for name in ("store", "mailboxes")]
    started = launch_worker(
        rank=3,
        device=CPU,
        shared_fds=shared_fds,
        cpu_threads=1,
        log_dir=tmp_path,
        nursery=nursery,
        end=time.monotonic() + 20,
    )
    for fd in shared_fds:
        os.close(fd)
    yield started
    end_workers([started], grace_s=0)
    nursery.close()


def test_a_worker_ends_when_its_host_closes_the_channel(launched):
    launched.channel.close()
    assert launched.process.wait(10) == 0
    assert "[rank 3]" in launched.log_tail()
    assert "the host is gone" in launched.log_tail()


def test_a_worker_that_is_told_something_else_first_reports_it_and_ends(launched):
    launched.channel.send(Stop(), deadline_s=1)
    reply = launched.channel.receive(deadline_s=10)
    assert isinstance(reply, Failed)
    assert reply.phase == "start"
    assert launched.process.wait(10) == 1
    with pytest.raises(ChannelClosedError):
        launched.channel.receive(deadline_s=1)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\7garbage",
        b"\xff\xff\xff\xff",
        b'\0\0\0\x1c{"type":"Drop","models":"x"}',
    ],
    ids=["no JSON", "length", "types"],
)
def test_a_worker_that_reads_what_is_no_message_reports_it_and_ends(launched, data):
    launched.channel._socket.send(data)
    reply = launched.channel.receive(deadline_s=10)
    assert isinstance(reply, Failed)
    assert reply.error.startswith("MessageError: ")
    assert launched.process.wait(10) == 1


def test_of_a_very_long_log_only_the_end_is_read(worker):
    ended = worker("pass", "x" * 10_000_000 + "\nlast")
    tail = ended.log_tail()
    assert tail.endswith("    last")
    assert len(tail) < 30_000


@pytest.mark.parametrize("host", ["another process", "another user", "no socket"])
def test_a_worker_reads_nothing_from_a_channel_that_its_host_did_not_make(host, tmp_path):
    """A pair that a third process made: its messages are well-formed, and never read."""
    script = "import os, socket; a, b = socket.socketpair(); "
    if host == "another user":
        if os.geteuid() != 0:
            pytest.skip("only root can take on another user's number")
        script += "os.seteuid(65534); a, b = socket.socketpair(); os.seteuid(0); "
    serve = "import sys; from comfy_xdit_patch.worker.process import serve; "
    serve += "serve(3, int(sys.argv[1]), -1, -1, int(sys.argv[2]))"
    worker = [sys.executable, "-c", serve]
    script += (
        "import subprocess, sys; from comfy_xdit_patch.wire.channel import Channel; "
        "from comfy_xdit_patch.wire.messages.requests import Stop; "
        "Channel(a).send(Stop(), deadline_s=1); "
    )
    if host == "no socket":
        script += "b = open('/dev/null'); "
    if host == "another process":  # The parent makes the pair, its child starts the worker.
        script += (
            "pid = os.fork(); os._exit(os.waitstatus_to_exitcode(os.wait()[1])) if pid else 0; "
        )
    script += (
        f"done = subprocess.run([*{worker!r}, str(b.fileno()), "
        "str(os.getpid())], pass_fds=[b.fileno()], capture_output=True, text=True); "
        "print(done.stderr, end='', flush=True); os._exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 1, done
    (line,) = done.stdout.splitlines()
    assert "[rank 3] ERROR" in line
    assert "not started by its host: " in line
    if host != "no socket":
        assert "The channel belongs to process " in line


def test_a_workers_log_is_its_own_and_cannot_be_read_by_others(launched, tmp_path):
    assert launched.log_path == tmp_path / "worker-3.log"
    assert stat.S_IMODE(launched.log_path.stat().st_mode) == 0o600
