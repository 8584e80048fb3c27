"""Talk to a ComfyUI server over HTTP, as its web page does.

Runs in: the rig's environment.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from rig.environment import RigError, tail
from rig.graphs import Graph
from rig.outputs import Outputs
from rig.progress import ProgressListener
from rig.status_schema import faults

REQUEST_DEADLINE_S = 30.0
FREE_AGAIN_S = 5.0
POLL_S = 0.05
STEP_POLL_S = 0.002
LOOK_S = 0.5

History = dict[str, Any]


class Client(Outputs):
    """Queue graphs on one server, wait for them, and read what they wrote."""

    def __init__(self, port: int, base_dir: Path, log_path: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.base_dir = base_dir
        self.log_path = log_path
        self.client_id = uuid.uuid4().hex
        self._progress: ProgressListener | None = None

    def listen(self) -> None:
        """Start to record progress messages."""
        address = self.url.replace("http:", "ws:", 1)
        self._progress = ProgressListener(address, self.client_id)

    def check_alive(self) -> None:
        """Raise if the server has ended; the owner of the process knows how."""

    def post_prompt(self, graph: Graph) -> str:
        """Queue a graph and return its prompt id; anything ComfyUI objects to is an error."""
        reply = self.request("/prompt", {"prompt": graph, "client_id": self.client_id})
        if reply.get("node_errors"):
            raise RigError(f"ComfyUI refused nodes: {json.dumps(reply['node_errors'])[:2000]}")
        return str(reply["prompt_id"])

    def wait(self, prompt_id: str, deadline_s: float) -> History:
        """Return the history entry of a prompt when it is finished."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            history = self.poll(prompt_id)
            if history is not None:
                return history
            time.sleep(POLL_S)
        raise RigError(f"{prompt_id}: not finished after {deadline_s} s.\n{tail(self.log_path)}")

    def poll(self, prompt_id: str) -> History | None:
        """Return the history entry of a prompt if it is finished; its failure is an exception."""
        self.check_alive()
        entry = self.request(f"/history/{prompt_id}").get(prompt_id)
        return None if entry is None else _finished(entry)

    def run(self, graph: Graph, deadline_s: float) -> History:
        """Queue a graph and wait for it."""
        return self.wait(self.post_prompt(graph), deadline_s)

    def step_times(self, prompt_id: str) -> list[float]:
        """Return the seconds between successive progress messages of a prompt."""
        return self._progress.step_times(prompt_id) if self._progress else []

    @property
    def texts(self) -> list[tuple[str, str]]:
        """What nodes have said in the page: the node, and the text."""
        return self._progress.texts if self._progress else []

    def num_steps_done(self, prompt_id: str) -> int:
        """Return how many steps of a prompt have been reported so far."""
        return self._progress.num_steps(prompt_id) if self._progress else 0

    def wait_for_steps(self, prompt_id: str, num_steps: int, deadline_s: float) -> None:
        """Wait until so many steps of a prompt have been reported.

        Raises:
            RigError: the prompt ended, or time ran out, and fewer were reported.
        """
        end = time.monotonic() + deadline_s
        look = 0.0
        while self.num_steps_done(prompt_id) < num_steps:
            now = time.monotonic()
            if now > look:
                is_over = self.poll(prompt_id) is not None or now > end
                if is_over and self.num_steps_done(prompt_id) < num_steps:
                    raise RigError(
                        f"{self.num_steps_done(prompt_id)} of {num_steps} steps were reported."
                        f"\n{tail(self.log_path)}"
                    )
                look = now + LOOK_S
            time.sleep(STEP_POLL_S)

    def status(self) -> dict[str, Any]:
        """Return what comfy_xdit_patch says of itself, as its schema has it."""
        try:
            status = self.request("/xdit/status")
        except RigError as error:
            raise RigError(
                f"comfy_xdit_patch is not active in this ComfyUI ({error}).\n{tail(self.log_path)}"
            ) from error
        if odd := faults(status):
            raise RigError(f"this is no status of the schema: {odd}")
        return status

    def queued(self) -> list[Any]:
        """Return the prompts that run or wait."""
        queue = self.request("/queue")
        return [*queue["queue_running"], *queue["queue_pending"]]

    def interrupt(self) -> None:
        """Cancel the running prompt, as the Cancel button does."""
        self.request("/interrupt", {})

    def free(self) -> None:
        """Unload models and free memory, as ComfyUI's menu does."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def free_and_wait(self) -> None:
        """Free, and wait until ComfyUI has done so."""
        self.free_until(
            lambda: not any(rank["weight_bytes"] for rank in self.status()["ranks"]),
            REQUEST_DEADLINE_S,
            "Free: the workers still hold weights.",
        )

    def free_until(self, is_so: Callable[[], bool], deadline_s: float, complaint: str) -> None:
        """Free, once at least, until something is so.

        ComfyUI misses what is asked for while it collects garbage after a prompt (main.py,
        prompt_worker), until something else is asked for: ask again.
        """
        self.free()
        end = time.monotonic() + deadline_s
        again = time.monotonic() + FREE_AGAIN_S
        while not is_so():
            if time.monotonic() > end:
                raise RigError(f"{complaint}\n{tail(self.log_path)}")
            if time.monotonic() > again:
                self.free()
                again = time.monotonic() + FREE_AGAIN_S
            time.sleep(POLL_S)

    def log_text(self) -> str:
        """Return everything the server has printed."""
        return self.log_path.read_text(errors="replace")

    def request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send GET, or POST with a body, and return the JSON of the answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_DEADLINE_S) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:2000]
            raise RigError(f"{path}: HTTP {error.code}: {detail}") from error
        return cast(dict[str, Any], json.loads(text)) if text else {}


def _finished(entry: History) -> History:
    status = entry.get("status") or {}
    if status.get("status_str") == "success" and status.get("completed"):
        return entry
    for kind, message in status.get("messages", []):
        if kind == "execution_error":
            trace = "".join(message.get("traceback", []))
            raise RigError(
                f"node {message.get('node_id')} ({message.get('node_type')}): "
                f"{message.get('exception_type')}: {message.get('exception_message')}\n{trace}"
            )
        if kind == "execution_interrupted":
            raise InterruptedError("the prompt was interrupted")
    raise RigError(f"the prompt did not succeed: {status}")
