"""Make the rig's Python environment once, reuse it, and put a fresh wheel of this checkout in it.

Runs in: any bare Python (standard library only).

The environment lives in the cache and is named after the lock file and the Python version, so a
changed lock makes a new one. It is built where it stays, for its scripts hold its path; a file
beside it says that it is not complete, so an interrupted build is never reused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = Path(__file__).with_name("requirements.lock")
PYTHON_VERSIONS = ((3, 11), (3, 12), (3, 13), (3, 14))
PIP_DEADLINE_S = 3600
RIG_CACHE = "RIG_CACHE"
"""Where the rig's cache is, in processes of tests: XDG_CACHE_HOME is an empty one for them."""
TAIL_LINES = 40
TELL_S = 10.0
"""How long something may go on without a word on the screen."""


class RigError(RuntimeError):
    """The rig cannot go on; the message says what, with the value, and what to do."""


def cache_root() -> Path:
    """Return the cache directory of the rig, made if it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(os.environ.get(RIG_CACHE) or Path(base) / "comfy-xdit-patch")
    root.mkdir(parents=True, exist_ok=True)
    return root


def tail(path: Path, num_lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log file, or a note that there is none."""
    if not path.exists():
        return f"(no log at {path})"
    return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold a lock among all processes that share the cache."""
    with (cache_root() / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Say now and then that something is still going on, and for how long."""
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(TELL_S):
            print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def run_logged(
    command: list[str], log_path: Path, what: str, deadline_s: float = PIP_DEADLINE_S
) -> None:
    """Run a command with its output in a log file; show the log's tail if it fails."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log, telling(what):
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        try:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=deadline_s)
        except subprocess.TimeoutExpired as error:
            raise RigError(f"{what}: not finished after {deadline_s} s.") from error
    if done.returncode:
        raise RigError(
            f"{what}: exit code {done.returncode}. Last lines of {log_path}:\n{tail(log_path)}"
        )


def environment_path() -> Path:
    """Return where the environment for this lock file and this Python belongs."""
    digest = hashlib.sha256(LOCK_FILE.read_bytes())
    digest.update("{}.{}".format(*sys.version_info[:2]).encode())
    return cache_root() / f"env-{digest.hexdigest()[:12]}"


def environment_python(environment: Path) -> Path:
    """Return the Python program of an environment."""
    return environment / "bin" / "python"


def ensure_environment() -> Path:
    """Return the Python of the rig's environment, building the environment if it is missing."""
    if sys.version_info[:2] not in PYTHON_VERSIONS:
        raise RigError(
            "Python {}.{} cannot install {}; use Python {}.".format(
                *sys.version_info[:2],
                LOCK_FILE.name,
                ", ".join(f"{major}.{minor}" for major, minor in PYTHON_VERSIONS),
            )
        )
    environment = environment_path()
    with exclusive(environment.name):
        incomplete = environment.with_name(f"{environment.name}.incomplete")
        if incomplete.exists() or not environment.exists():
            incomplete.touch()
            _build(environment)
            incomplete.unlink()
    return environment_python(environment)


def _build(environment: Path) -> None:
    log_path = cache_root() / "logs" / f"{environment.name}.log"
    log_path.unlink(missing_ok=True)
    run_logged(
        [sys.executable, "-m", "venv", "--clear", str(environment)],
        log_path,
        "making the environment",
    )
    pip = [str(environment_python(environment)), "-m", "pip", "--disable-pip-version-check"]
    run_logged(
        [*pip, "install", "--no-input", "--progress-bar", "off", "-r", str(LOCK_FILE)],
        log_path,
        f"installing {LOCK_FILE.name}",
    )


def install_wheel(python: Path, checkout: Path) -> str:
    """Build this checkout's wheel, install it afresh into the environment, return its version."""
    log_path = cache_root() / "logs" / "wheel.log"
    log_path.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    with exclusive("wheel"), tempfile.TemporaryDirectory(prefix="xdit-wheel-") as folder:
        run_logged(
            [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, str(checkout)],
            log_path,
            "building the wheel",
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise RigError(f"building the wheel: expected one wheel, found {wheels}.")
        run_logged(
            [*pip, "install", "--no-input", "--no-deps", "--force-reinstall", str(wheels[0])],
            log_path,
            "installing the wheel",
        )
        return wheels[0].name.split("-")[1]
