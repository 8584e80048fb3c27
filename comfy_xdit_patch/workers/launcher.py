"""Start one worker process on this machine, and end it.

Runs in: host process.

The seam for other launchers: a pool needs nothing of a worker but what ``Worker`` offers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_xdit_patch.planning.topology import Device
from comfy_xdit_patch.transport.channel import Channel
from comfy_xdit_patch.workers.environment import worker_variables
from comfy_xdit_patch.workers.nursing import Nursery, RankProcess

log = logging.getLogger(__name__)

TAIL_LINES = 12
TAIL_BYTES = 20_000
GRACE_S = 2.0
KILL_S = 10.0
"""A process inside a driver that hangs cannot be killed, and must not keep ComfyUI waiting."""
LOG_PREFIX = "comfy-xdit-patch-"
PID_SUFFIX = ".pid"
"""Of an empty file beside the log, named after the worker's number: there while the worker is."""

_log_dirs: set[Path] = set()


@dataclass(slots=True)
class Worker:
    """One worker process, as the host sees it."""

    rank: int
    device: Device
    process: RankProcess
    channel: Channel
    log_path: Path

    def exit_text(self) -> str:
        """How the process ended, in words."""
        code = self.process.poll()
        if code is None:
            return "is alive"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def log_tail(self) -> str:
        """The last lines of the worker's log."""
        try:
            with self.log_path.open("rb") as log_file:
                log_file.seek(max(0, os.fstat(log_file.fileno()).st_size - TAIL_BYTES))
                lines = log_file.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:]) or "    (its log is empty)"


def end_workers(workers: Sequence[Worker], *, grace_s: float = GRACE_S) -> None:
    """Wait a little for all of them to end by themselves, then kill those that have not."""
    _wait_for(workers, grace_s)
    for worker in workers:
        worker.process.kill()
    _wait_for(workers, KILL_S)
    for worker in workers:
        worker.channel.close()
        if worker.process.poll() is None:
            log.error(
                "xDiT: Rank %d (pid %d, %s) does not end although it was killed",
                worker.rank,
                worker.process.pid,
                worker.device.name,
            )
        else:
            _mark_of(worker.log_path, worker.process.pid).unlink(missing_ok=True)


def _wait_for(workers: Sequence[Worker], seconds: float) -> None:
    end = time.monotonic() + seconds
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=max(0.0, end - time.monotonic()))


def launch_worker(
    *,
    rank: int,
    device: Device,
    store_fd: int,
    cpu_threads: int,
    log_dir: Path,
    nursery: Nursery,
    end: float,
    peer_to_peer: bool = True,
) -> Worker:
    """Have the nursery fork a worker."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    log_path = log_dir / f"worker-{rank}.log"
    variables = worker_variables(device, cpu_threads=cpu_threads, peer_to_peer=peer_to_peer)
    with theirs, open(log_path, "wb", opener=_private) as log_file:
        fds = [theirs.fileno(), store_fd, log_file.fileno()]
        process = nursery.fork(rank, variables, fds, end=end)
    _mark_of(log_path, process.pid).touch(0o600)
    return Worker(rank, device, process, Channel(ours, takes_fds=False), log_path)


def _mark_of(log_path: Path, pid: int) -> Path:
    return log_path.with_name(f"{pid}{PID_SUFFIX}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def make_log_dir() -> Path:
    """Make a private directory for this host's worker logs; clear away those of ended hosts.

    The name cannot be foreseen, so nobody can put a link or a directory of theirs in its place.
    """
    base = Path(tempfile.gettempdir())
    for old in base.glob(f"{LOG_PREFIX}*"):
        pid = old.name.removeprefix(LOG_PREFIX).split("-")[0]
        if not pid.isdigit() or old.is_symlink() or old in _log_dirs:
            continue
        if int(pid) == os.getpid():
            _wait_for_workers_of_before(old)
        elif Path(f"/proc/{pid}").exists():
            continue
        shutil.rmtree(old, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{LOG_PREFIX}{os.getpid()}-"))
    _log_dirs.add(made)
    return made


def _wait_for_workers_of_before(log_dir: Path) -> None:
    """Wait for the children of the program that ran in this process before.

    ComfyUI-Manager restarts ComfyUI with ``execv``. The kernel ends the workers then, and keeps
    their numbers until this process, which is still their parent, waits for them.
    """
    for path in log_dir.glob(f"*{PID_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError):
            os.waitpid(int(path.stem), os.WNOHANG)
