"""The logs of the nursery and of the ranks: where they lie, how they end, when they go.

Runs in: host process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

TAIL_LINES = 12
TAIL_BYTES = 20_000
LOG_PREFIX = "comfy-xdit-patch-"
PID_SUFFIX = ".pid"
"""Of an empty file beside the log, named after the nursery's number: there while it is."""

_log_dirs: set[Path] = set()


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


def private(path: str, flags: int) -> int:
    """An opener of files that nobody else may read."""
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
            _wait_for_nurseries_of_before(old)
        elif Path(f"/proc/{pid}").exists():
            continue
        shutil.rmtree(old, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{LOG_PREFIX}{os.getpid()}-"))
    _log_dirs.add(made)
    return made


def _wait_for_nurseries_of_before(log_dir: Path) -> None:
    """Wait for the children of the program that ran in this process before.

    ComfyUI-Manager restarts ComfyUI with ``execv``. The kernel ends the nursery then, and keeps its
    number until this process, which is still its parent, waits for it.
    """
    for path in log_dir.glob(f"*{PID_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError):
            os.waitpid(int(path.stem), os.WNOHANG)
