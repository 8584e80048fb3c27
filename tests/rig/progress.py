"""Listen to ComfyUI's websocket, and remember when each step was reported.

Runs in: the rig's environment, in a thread beside the caller.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections import defaultdict
from itertools import pairwise

import websocket

CONNECT_DEADLINE_S = 10.0
POLL_S = 0.2
TEXT = 3
"""ComfyUI's number for a text among its binary messages (server.py, BinaryEventTypes)."""


class ProgressListener:
    """Record the time of every ``progress`` message, per prompt."""

    def __init__(self, url: str, client_id: str) -> None:
        self.texts: list[tuple[str, str]] = []
        """What nodes said: the node, and the text in the page."""
        self._stamps: dict[str, list[tuple[str, int, float]]] = defaultdict(list)
        self._socket = websocket.create_connection(
            f"{url}/ws?clientId={client_id}", timeout=CONNECT_DEADLINE_S
        )
        self._socket.settimeout(POLL_S)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="rig-progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        self._thread.join(CONNECT_DEADLINE_S)
        self._socket.close()

    def num_steps(self, prompt_id: str) -> int:
        """Return the last reported step of a prompt, over all its samplers."""
        return len({(node, value) for node, value, _ in self._stamps[prompt_id] if value > 0})

    def step_times(self, prompt_id: str) -> list[float]:
        """Return the seconds between successive steps of the same node."""
        stamps = list(self._stamps[prompt_id])
        return [
            later - earlier
            for (node, value, earlier), (next_node, next_value, later) in pairwise(stamps)
            if node == next_node and next_value == value + 1 and value > 0
        ]

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                text = self._socket.recv()
            except websocket.WebSocketTimeoutException:
                continue
            except (websocket.WebSocketException, OSError):
                return
            if isinstance(text, str) and text:
                self._record(json.loads(text))
            elif isinstance(text, bytes):
                self._read_text(text)

    def _read_text(self, message: bytes) -> None:
        """Keep what a node says of itself; pictures come as bytes too."""
        kind, length = struct.unpack_from(">II", message)
        if kind == TEXT:
            self.texts.append((message[8 : 8 + length].decode(), message[8 + length :].decode()))

    def _record(self, message: dict[str, object]) -> None:
        data = message.get("data")
        if message.get("type") == "progress" and isinstance(data, dict):
            stamp = (str(data.get("node")), int(data.get("value", 0)), time.monotonic())
            self._stamps[str(data.get("prompt_id"))].append(stamp)
