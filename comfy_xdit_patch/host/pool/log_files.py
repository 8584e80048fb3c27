"""The logs of the nursery and of the ranks: where they lie, how they end, when they go.

Runs in: host process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from comfy_xdit_patch.errors import WorkerError

TAIL_LINES = 12
TAIL_BYTES = 20_000
LOG_PREFIX = "comfy-xdit-patch-"
PID_SUFFIX = ".pid"
"""Of an empty file beside the log, named after the nursery's number: there while it is."""
LOCK = "lock"
"""A file of the directory, locked while its host lives. A process number would say less: another
container with the same directory has other processes under the same numbers."""
BEFORE = ".1"
"""After the name of a log: that of the process before."""

_locks: dict[Path, int] = {}


def tail_of(log_path: Path) -> str:
    """The last lines of a log."""
    try:
        with log_path.open("rb") as log_file:
            log_file.seek(max(0, os.fstat(log_file.fileno()).st_size - TAIL_BYTES))
            lines = log_file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:]) or "    (its log is empty)"


def mark_of(log_path: Path, pid: int) -> Path:
    """The file that tells a process's number."""
    return log_path.with_name(f"{pid}{PID_SUFFIX}")


def begin(log_path: Path) -> BinaryIO:
    """Begin a log that nobody else may read, and keep the one before.

    Raises:
        OSError: it cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        log_path.replace(log_path.with_name(log_path.name + BEFORE))
    return open(log_path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600))


class LogDirectory:
    """Where this host's logs lie: a private directory, made again where somebody removed it."""

    def __init__(self, base: Path | None) -> None:
        """Name the directory to make it in; None is the system's for temporary files."""
        self._base = base
        self._made: Path | None = None

    def get(self) -> Path:
        """The directory, which is there.

        Raises:
            WorkerError: it cannot be made.
        """
        if self._made is None or not self._made.is_dir():
            try:
                base = self._base or Path(tempfile.gettempdir())
                base.mkdir(parents=True, exist_ok=True)
                self._made = make_log_dir(base)
            except OSError as error:
                raise WorkerError(
                    f"There is no place for the logs of the workers: {error}. XDIT_LOG_DIR names "
                    "a folder for them."
                ) from None
        return self._made


def make_log_dir(base: Path) -> Path:
    """Make a private directory for this host's logs; clear away those of ended hosts but the last.

    The name cannot be foreseen, so nobody can put a link or a directory of theirs in its place.
    """
    ended = [old for old in base.glob(f"{LOG_PREFIX}*") if _has_ended(old)]
    for old in sorted(ended, key=_last_change)[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    # It gets its name once it is locked: until then nobody takes it for one that has ended.
    new = Path(tempfile.mkdtemp(prefix=f".{LOG_PREFIX}", dir=base))
    lock = os.open(new / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    made = new.with_name(f"{LOG_PREFIX}{os.getpid()}-{new.name.removeprefix(f'.{LOG_PREFIX}')}")
    new.rename(made)
    _locks[made] = lock
    return made


def _has_ended(log_dir: Path) -> bool:
    """Whether this is a directory of ours whose host is no more."""
    pid = log_dir.name.removeprefix(LOG_PREFIX).split("-")[0]
    if not pid.isdigit() or log_dir.is_symlink() or not log_dir.is_dir() or log_dir in _locks:
        return False
    try:
        if log_dir.stat().st_uid != os.getuid():
            return False
        with open(log_dir / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if int(pid) == os.getpid():
        _wait_for_nurseries_of_before(log_dir)
    return True


def _last_change(log_dir: Path) -> float:
    try:
        return log_dir.stat().st_mtime
    except OSError:
        return 0.0


def _wait_for_nurseries_of_before(log_dir: Path) -> None:
    """Wait for the children of the program that ran in this process before.

    ComfyUI-Manager restarts ComfyUI with ``execv``. The kernel ends the nursery then, and keeps its
    number until this process, which is still its parent, waits for it.
    """
    for path in log_dir.glob(f"*{PID_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError):
            os.waitpid(int(path.stem), os.WNOHANG)
