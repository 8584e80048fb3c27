"""Start ComfyUI processes by forking from one that has imported others' packages.

Runs in: the test's process.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rig.environment import RigError

SCRIPT = Path(__file__).with_name("warm_process.py")
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
READ_EARLY = ("HOME", "TMPDIR", "MALLOC_MMAP_THRESHOLD_", *THREADS)
"""Variables that libraries read when they are loaded: others of them need a cold start."""
IMPORT_DEADLINE_S = 120.0


class Forked:
    """What was forked, with the part of ``subprocess.Popen`` that the rig uses."""

    def __init__(self, warm: Warm, pid: int) -> None:
        self.pid = pid
        self._warm = warm

    def poll(self) -> int | None:
        """The exit code, a signal's negative; None while it runs."""
        self._warm.hear(0.0)
        return self._warm.codes.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return its code.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(str(SCRIPT), timeout or 0.0)
            self._warm.hear(min(0.5, max(0.0, end - time.monotonic())))
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Warm:
    """The process that forks."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link = ours
        self._lock = threading.RLock()
        self._pids: list[int] = []
        self.codes: dict[int, int] = {}
        environment = {**os.environ, **THREADS, "XDIT_STRATEGY": "off"}
        environment.pop("PYTHONPATH", None)  # That of what is forked is another.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(theirs.fileno())],
                env=_writes_bytecode(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        atexit.register(self.close)

    def fork(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        descriptors: Mapping[int, int],
    ) -> Forked:
        """Start ``python command...``; ``descriptors`` says which of ours is which of its own."""
        request = {
            "script": command[0],
            "arguments": command[1:],
            "folder": str(folder),
            "environment": dict(environment),
            "targets": list(descriptors),
        }
        with self._lock:
            socket.send_fds(self._link, [json.dumps(request).encode()], [*descriptors.values()])
            end = time.monotonic() + IMPORT_DEADLINE_S
            while not self._pids:
                if time.monotonic() > end:
                    raise RigError(f"{SCRIPT.name} does not answer within {IMPORT_DEADLINE_S} s.")
                self.hear(0.5)
            pid = self._pids.pop()
            self.codes.pop(pid, None)
            return Forked(self, pid)

    def hear(self, wait_s: float) -> None:
        """Take in what the process has to say, for up to this long."""
        with self._lock:
            while select.select([self._link], [], [], wait_s)[0]:
                message = self._link.recv(1 << 12)
                if not message:
                    raise RigError(f"{SCRIPT.name} ended with code {self._process.wait()}.")
                said: dict[str, Any] = json.loads(message)
                if "code" in said:
                    self.codes[said["pid"]] = said["code"]
                else:
                    self._pids.append(said["pid"])
                wait_s = 0.0

    def close(self) -> None:
        """End it; what it forked goes on."""
        self._link.close()
        self._process.wait()


def start(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    stdin: int,
    output: int,
    pass_fds: Sequence[int] = (),
    interpreter: Sequence[str] = (sys.executable,),
    is_cold: bool = False,
) -> subprocess.Popen[bytes] | Forked:
    """Start a Python script in a session of its own: forked, unless it is to be cold.

    It is cold too with another interpreter, or where a variable differs that libraries read early.
    """
    environment = _writes_bytecode(environment)
    ours = {**os.environ, **THREADS}
    is_other = any(environment.get(name) != ours.get(name) for name in READ_EARLY)
    if is_cold or is_other or list(interpreter) != [sys.executable]:
        return subprocess.Popen(
            [*interpreter, *command],
            cwd=folder,
            env=environment,
            stdin=stdin,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            start_new_session=True,
            # A shell has what it runs in the background, tests too, ignore Ctrl+C.
            preexec_fn=_hear_interrupts,
        )
    descriptors = {0: stdin, 1: output, 2: output} | {fd: fd for fd in pass_fds}
    return _warm().fork(command, folder=folder, environment=environment, descriptors=descriptors)


@functools.cache
def _warm() -> Warm:
    """The one of this process, started when it is first needed."""
    return Warm()


def _writes_bytecode(environment: Mapping[str, str]) -> dict[str, str]:
    """Compiling ComfyUI's files takes a fifth of its start: once is enough."""
    return {k: v for k, v in environment.items() if k != "PYTHONDONTWRITEBYTECODE"}


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
