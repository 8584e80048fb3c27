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
from comfy_xdit_patch.transport.messages import Start, encode

# Not ``-m``: that would look for modules in the working directory first.
BOOTSTRAP = (
    "import sys; sys.path[:1] = [] if sys.path[:1] == [''] else sys.path[:1]; "
    "from comfy_xdit_patch.workers.nursery import main; main()"
)
MAX_BYTES = 1 << 16
KILLED = -signal.SIGKILL
CODE_S = 1.0


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
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def __del__(self) -> None:
        os.close(self._pidfd)


class Nursery:
    """One nursery process."""

    def __init__(
        self, *, log_path: Path, environment: dict[str, str], warm_up: Start | None
    ) -> None:
        """Start it, and have it import what ``warm_up`` says meanwhile."""
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}
        self._born: list[tuple[int, int]] = []
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        command = [sys.executable, *flags, "-c", BOOTSTRAP, str(theirs.fileno()), str(os.getpid())]
        with theirs, open(log_path, "wb", opener=_private) as log_file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(theirs.fileno(),),
            )
        if warm_up is not None:
            self._socket.send(encode(warm_up))

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def fork(
        self, rank: int, environment: dict[str, str], fds: list[int], *, end: float
    ) -> RankProcess:
        """Have a rank forked, once everything is imported.

        Raises:
            WorkerError: the nursery ended, or the deadline came.
        """
        order = json.dumps({"rank": rank, "environment": environment}).encode()
        try:
            socket.send_fds(self._socket, [order], fds)
        except OSError as error:
            raise WorkerError(f"The nursery of the ranks is gone ({error}).") from None
        while not self._born:
            if time.monotonic() > end or not self.is_alive:
                raise WorkerError(f"The nursery of the ranks made no rank {rank}.")
            self._read(0.1)
        return RankProcess(*self._born.pop(0), self)

    def code_of(self, pid: int) -> int:
        """The exit code of a rank that has ended."""
        end = time.monotonic() + CODE_S
        while pid not in self._codes and time.monotonic() < end and self.is_alive:
            self._read(0.02)
        return self._codes.get(pid, KILLED)  # The kernel kills the ranks of a nursery that died.

    def close(self) -> None:
        """End it, and with it all ranks that are left."""
        self._socket.close()
        self.process.kill()
        self.process.wait()

    def _read(self, timeout_s: float) -> None:
        with self._lock:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            while poller.poll(timeout_s * 1000):
                try:
                    data, fds, _, _ = socket.recv_fds(self._socket, MAX_BYTES, 1)
                except OSError:
                    return
                if not data:
                    return
                message = json.loads(data)
                if fds:
                    self._born.append((message["pid"], fds[0]))
                else:
                    self._codes[message["ended"]] = message["code"]
                timeout_s = 0.0


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
