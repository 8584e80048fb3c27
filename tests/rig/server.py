"""Run a real ComfyUI server in a process group of its own.

Runs in: the rig's environment; ComfyUI itself is a child process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rig.client import POLL_S, Client
from rig.environment import RigError, tail
from rig.trees import Tree
from rig.warm import THREADS, Forked, start

SHIM = Path(__file__).with_name("shim")
EMULATED = Path(__file__).with_name("emulated_gpu")
LEDGER = "cards"
"""Of a server with emulated cards, in its base directory: what each process has on each card."""
START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 10.0
FRONT_END = "<!doctype html><title>ComfyUI without its web page</title>"
FOLDERS = ("input", "output", "temp", "user", "custom_nodes", "front-end")


class Server(Client):
    """A ComfyUI server as a context manager.

    Args:
        tree: the ComfyUI source tree.
        base_dir: ComfyUI's base directory; its ``models`` must exist.
        env: settings of this server. The caller's own XDIT_* variables are not passed on.
        device: ``cpu`` starts ComfyUI with ``--cpu``; ``gpu`` lets ComfyUI choose; ``emulated``
            gives it cards that the CPU emulates (``EMULATED_CARDS``, emulated_gpu/).
        is_cold: whether ComfyUI starts as a user's does, in an interpreter of its own and with the
            nodes of paid services. Others are forked from ``warm.py``'s where arguments allow it.
        threads: CPU threads of the ComfyUI process; None leaves them alone.
        node_packs: directories of custom nodes; no others are loaded.
    """

    def __init__(
        self,
        tree: Tree,
        base_dir: Path,
        *,
        env: Mapping[str, str] | None = None,
        extra_args: Sequence[str] = (),
        python: Path | str = sys.executable,
        log_path: Path | None = None,
        device: str = "cpu",
        threads: int | None = 1,
        start_deadline_s: float = START_DEADLINE_S,
        node_packs: Sequence[Path] = (),
        within: Sequence[str] = (),
        is_cold: bool = False,
    ) -> None:
        if device not in ("cpu", "gpu", "emulated"):
            raise ValueError(f"device={device!r} is not one of cpu, gpu, emulated.")
        base_dir = base_dir.resolve()
        port = free_port()
        super().__init__(port, base_dir, (log_path or base_dir / "server.log").resolve())
        self.tree = tree
        self.env = dict(env or {})
        self.process: subprocess.Popen[bytes] | Forked | None = None
        self.start_s = 0.0
        self._start_deadline_s = start_deadline_s
        cache = {"XDG_CACHE_HOME": str(base_dir / "cache")}
        self.environment = environment_of({**cache, **self.env}, threads)
        if device == "emulated":
            self.environment["PYTHONPATH"] += f"{os.pathsep}{EMULATED}"
            folders = (EMULATED / "bin", Path(python).parent, os.environ["PATH"])
            path = os.pathsep.join(map(str, folders))
            cards = {"EMULATED_CARDS": "4090", "EMULATED_LEDGER": str(base_dir / LEDGER)}
            self.environment = {**cards, **self.environment, "PATH": path}
        self._interpreter = [*within, str(python)]
        self._is_cold = is_cold or device != "cpu"
        self._command = ["main.py", "--listen", "127.0.0.1"]
        self._command += ["--port", str(port)]
        self._command += ["--base-directory", str(base_dir), "--disable-auto-launch"]
        self._command += ["--front-end-root", str(base_dir / "front-end")]
        self._command += ["--database-url", "sqlite:///:memory:", "--disable-all-custom-nodes"]
        self._command += ["--use-pytorch-cross-attention", *(["--cpu"] if device == "cpu" else [])]
        self._command += [*extra_args, *([] if is_cold else ["--disable-api-nodes"])]
        self._node_packs = node_packs
        if node_packs:
            self._command += ["--whitelist-custom-nodes", *(pack.name for pack in node_packs)]

    def __enter__(self) -> Server:
        for folder in FOLDERS:
            (self.base_dir / folder).mkdir(parents=True, exist_ok=True)
        (self.base_dir / "front-end" / "index.html").write_text(FRONT_END)
        for pack in self._node_packs:
            link = self.base_dir / "custom_nodes" / pack.name
            link.unlink(missing_ok=True)
            link.symlink_to(pack.resolve(), target_is_directory=True)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with self.log_path.open("wb") as log, open(os.devnull, "rb") as nothing:
            self.process = start(
                self._command,
                folder=self.tree.path,
                environment=self.environment,
                stdin=nothing.fileno(),
                output=log.fileno(),
                interpreter=self._interpreter,
                is_cold=self._is_cold,
            )
        try:
            self._await_ready()
            self.start_s = time.monotonic() - started
            self.listen()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and everything in its process group."""
        if self._progress is not None:
            self._progress.close()
        process = self.process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_DEADLINE_S)

    def have(self, env: Mapping[str, str]) -> None:
        """Go on as if started with these variables; if XDIT_* ones differ, the ranks are new."""
        if env != self.env:
            self.request("/rig/settings", settings_of(env))
            self.env = dict(env)

    def start_again(self) -> None:
        """Wait until ComfyUI answers again that replaced itself in its process."""
        self._await_ready()
        if self._progress is not None:
            self._progress.close()
        self.listen()

    def check_alive(self) -> None:
        """Raise if ComfyUI has ended."""
        code = self.process.poll() if self.process else None
        if code is not None:
            raise RigError(
                f"ComfyUI {self.tree.version} ended with code {code}.\n{tail(self.log_path)}"
            )

    def _await_ready(self) -> None:
        end = time.monotonic() + self._start_deadline_s
        while time.monotonic() < end:
            self.check_alive()
            with contextlib.suppress(OSError):
                self.request("/system_stats")
                return
            time.sleep(POLL_S)
        raise RigError(
            f"ComfyUI {self.tree.version} did not answer within {self._start_deadline_s} s."
            f"\n{tail(self.log_path)}"
        )


@contextlib.contextmanager
def base_directory(path: Path, models: Path, *, keep: bool = False) -> Iterator[Path]:
    """Make a base directory for one server around a shared ``models``; remove it at the end."""
    path.mkdir(parents=True, exist_ok=True)
    link = path / "models"
    link.unlink(missing_ok=True)
    link.symlink_to(models, target_is_directory=True)
    try:
        yield path
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


STEADY = {"XDIT_BALANCE": "even", "XDIT_START": "first"}
"""Two test processes on two cores: shares, and so plans, would follow the noise; and how many steps
ComfyUI computes alone before the ranks are ready would be chance."""


def settings_of(env: Mapping[str, str]) -> dict[str, str]:
    """XDIT_* variables of a test, which wants the ranks where it does not ask for ``auto``."""
    is_measured = "XDIT_GPUS" in env and env.get("XDIT_STRICT", "0") == "0"
    return {**STEADY, **({"XDIT_STRATEGY": "ulysses"} if is_measured else {}), **env}


def door_key(env: Mapping[str, str]) -> dict[str, str]:
    """What tells processes apart: those with ranks can have their XDIT_* variables changed."""
    if not env.get("XDIT_GPUS", "").startswith("cpu:") or env.get("XDIT_STRATEGY") == "off":
        return dict(env)
    return {"ranks": "any", **{k: v for k, v in env.items() if not k.startswith("XDIT_")}}


def environment_of(env: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """All variables of a ComfyUI process with these settings, the rig's shim first on its path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XDIT_")}
    if threads is not None:
        environment |= dict.fromkeys(THREADS, str(threads))
    environment["PYTHONPATH"] = str(SHIM)
    return environment | settings_of(env)
