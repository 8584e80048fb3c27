"""The host's end of the nursery: have it started, have ranks forked, know how they end.

Runs in: host process, in the keeper's thread; ``RankProcess`` in any.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.host.pool.log_files import begin, mark_of, tail_of
from comfy_xdit_patch.wire.messages.codec import MAX_START_BYTES, encode
from comfy_xdit_patch.wire.messages.requests import Start

KILLED = -signal.SIGKILL
BOOTSTRAP = (
    "import sys; sys.path[:1] = [] if sys.path[:1] == [''] else sys.path[:1]; "
    "from comfy_xdit_patch.worker.nursery import main; main()"
)
"""Not ``-m``, which would look for modules in the working directory first."""
CODE_S = 5.0


class RankProcess:
    """A forked rank, with what ``Popen`` offers of its child."""

    def __init__(self, pid: int, pidfd: int, nursery: Nursery) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._nursery = nursery

    def poll(self) -> int | None:
        if self.returncode is None and self._has_ended(0.0):
            self.returncode = self._nursery.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it lives on.
        """
        if self.returncode is None and not self._has_ended(timeout):
            raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _has_ended(self, timeout_s: float) -> bool:
        return _is_readable(self._pidfd, timeout_s)

    def __del__(self) -> None:
        os.close(self._pidfd)


class Nursery:
    """One nursery process. It ends with the thread that made it."""

    def __init__(
        self, *, log_path: Path, environment: dict[str, str], warm_up: Start | None
    ) -> None:
        """Start it, and have it import what ``warm_up`` says meanwhile.

        Raises:
            OSError: the system has no process, memory or descriptor for it.
        """
        # Threads that OpenBLAS starts when NumPy is imported would not survive a fork.
        self._environment = {**environment, "OPENBLAS_NUM_THREADS": "1"}
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}
        self._born: list[tuple[int, int]] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        fd = theirs.fileno()
        command = [sys.executable, *flags, "-c", BOOTSTRAP, str(fd), str(os.getpid()), "warm"]
        with contextlib.ExitStack() as on_failure:
            on_failure.enter_context(ours)
            with theirs, begin(log_path) as log_file:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(fd,),
                )
            on_failure.pop_all()
        self._socket = ours
        self._log_path = log_path
        mark_of(log_path, self.process.pid).touch(0o600)
        if warm_up is not None:
            with contextlib.suppress(OSError):  # It has ended: the first fork says so.
                self._socket.send(encode(warm_up))

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def fork(self, rank: int, variables: dict[str, str], fds: list[int], end: float) -> RankProcess:
        """Have a rank forked, once everything is imported.

        Args:
            variables: the whole environment of the rank.
            fds: of its channel, of the store, of the mailboxes, of its log.
            end: the deadline, on the monotonic clock.

        Raises:
            WorkerError: the nursery ended, or the deadline came, and then it was ended.
        """
        names = self._environment.keys() | variables.keys()
        changed = {
            n: variables.get(n) for n in names if variables.get(n) != self._environment.get(n)
        }
        order = json.dumps({"rank": rank, "variables": changed}).encode()
        with contextlib.suppress(OSError):  # It has ended, which is seen below.
            socket.send_fds(self._socket, [order], fds)
        while time.monotonic() < end:
            with self._lock:
                self._read(0.1)
                if self._born:
                    return RankProcess(*self._born.pop(), self)
            if not self.is_alive:
                break
        self.close()  # A rank that it forked too late would be nobody's.
        raise WorkerError(
            f"The process that ranks are forked from made no rank {rank}. Last lines of "
            f"{self._log_path}:\n{tail_of(self._log_path)}"
        )

    def code_of(self, pid: int) -> int:
        """The exit code of a rank that has ended."""
        end = time.monotonic() + CODE_S
        is_alive = True
        while is_alive and pid not in self._codes:
            is_alive = self.is_alive
            with self._lock:
                self._read(0.02)
            if time.monotonic() > end:
                self.process.kill()  # It is stopped. The ranks are lost with the one that ended.
        # The kernel kills the ranks of a nursery that ended. Where this is the first process of a
        # container, they are its children then.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return self._codes.get(pid, KILLED)

    def close(self) -> None:
        """End it, and with it all ranks that are left."""
        self.process.kill()
        self.process.wait()
        mark_of(self._log_path, self.process.pid).unlink(missing_ok=True)
        with self._lock:
            self._read(0.0)
            for _, pidfd in self._born:
                os.close(pidfd)
            self._born.clear()
            self._socket.close()

    def _read(self, timeout_s: float) -> None:
        """Read what it says, with the lock held. Returns at the first word, or the timeout."""
        while self._socket.fileno() >= 0 and _is_readable(self._socket.fileno(), timeout_s):
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, MAX_START_BYTES, 1)
            except ConnectionResetError:  # It ended with something unread.
                return
            if not data:
                return
            message = json.loads(data)
            if fds:
                self._born.append((message["pid"], fds[0]))
            else:
                self._codes[message["ended"]] = message["code"]
            timeout_s = 0.0


def _is_readable(fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
