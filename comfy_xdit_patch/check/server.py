"""One ComfyUI, started as its user starts it, and ended with all its processes.

Runs in: the check's process; ComfyUI is a child of it, in a process group of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from comfy_xdit_patch.check.graph import finished
from comfy_xdit_patch.errors import CheckError

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 15.0
REQUEST_DEADLINE_S = 30.0
POLL_S = 0.1
TAIL_LINES = 25
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PACK = Path(__file__).with_name("nodes_pack")
PACK_NAME = "xdit_check_nodes"
PAGE = "<!doctype html><title>ComfyUI of comfy-xdit check</title>"
FOLDERS = ("input", "output", "temp", "user", "custom_nodes", "front-end", "models")
ALWAYS = ("--disable-auto-launch", "--disable-all-custom-nodes", "--disable-metadata")
WHERE_KNOWN = ("--disable-api-nodes",)
"""Left out where this ComfyUI has no such option."""


def knows(tree: Path, option: str) -> bool:
    """Whether this ComfyUI has a command line option."""
    return f'"{option}"' in (tree / "comfy" / "cli_args.py").read_text()


class ComfyServer:
    """A ComfyUI as a context manager.

    Args:
        tree: where its ``main.py`` is.
        base_dir: its base directory; models are there.
        options: further options of its command line.
        variables: XDIT_* variables. The caller's own are not passed on.
    """

    def __init__(
        self, tree: Path, base_dir: Path, options: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        self.log_path = base_dir / "comfyui.log"
        self._base_dir = base_dir
        self._tree = tree
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        # A proxy of the user's is not asked for an address of this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(port)]
        self._command += ["--base-directory", str(base_dir)]
        self._command += ["--front-end-root", str(base_dir / "front-end")]
        self._command += [*ALWAYS, *(option for option in WHERE_KNOWN if knows(tree, option))]
        self._command += ["--whitelist-custom-nodes", PACK_NAME]
        if knows(tree, "--database-url"):
            self._command += ["--database-url", "sqlite:///:memory:"]
        self._command += options
        others = {key: value for key, value in os.environ.items() if not key.startswith("XDIT_")}
        self._environment = {**others, **variables}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        for folder in FOLDERS:
            (self._base_dir / folder).mkdir(parents=True, exist_ok=True)
        (self._base_dir / "front-end" / "index.html").write_text(PAGE)
        place = self._base_dir / "custom_nodes" / PACK_NAME
        shutil.copytree(PACK, place, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=self._tree,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._await_ready()
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
        """End ComfyUI and everything in its process group."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # It may hang in the driver.
            process.wait(STOP_DEADLINE_S)

    def run(self, graph: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """Queue a graph and return its history when it is finished.

        Raises:
            CheckError: ComfyUI refused it, failed, ended, or took longer.
        """
        prompt_id = str(self.request("/prompt", {"prompt": graph})["prompt_id"])
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            self._check_alive()
            entry = self.request(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return finished(entry)
            time.sleep(POLL_S)
        raise CheckError(f"The image was not finished after {deadline_s:g} s.")

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send GET, or POST with a body, and return the JSON of the answer.

        Raises:
            CheckError: the answer is an error, or none.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data)
        request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=REQUEST_DEADLINE_S) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:1000]
            raise CheckError(f"ComfyUI answers {path} with {error.code}: {detail}") from error
        except OSError as error:
            raise CheckError(f"ComfyUI does not answer {path}: {error}") from error
        answer: dict[str, Any] = json.loads(text) if text else {}
        return answer

    def log_lines(self) -> list[str]:
        """Return what ComfyUI has printed."""
        with contextlib.suppress(OSError):
            return COLOUR.sub("", self.log_path.read_text(errors="replace")).splitlines()
        return []

    def _check_alive(self) -> None:
        code = self._process.poll() if self._process else None
        if code is not None:
            raise CheckError(f"ComfyUI ended with code {code}.")

    def _await_ready(self) -> None:
        end = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < end:
            self._check_alive()
            with contextlib.suppress(CheckError):
                self.request("/system_stats")
                return
            time.sleep(POLL_S)
        raise CheckError(f"ComfyUI did not answer within {START_DEADLINE_S:g} s.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
