"""Tell the host that this process runs, and how far its computation is.

Runs in: worker process, in a thread of its own: a computation that hangs does not stop it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError
from comfy_xdit_patch.transport.channel import Channel
from comfy_xdit_patch.transport.replies import Alive

BEAT_S = 0.25
SEND_DEADLINE_S = 30.0


class Heartbeat:
    """Beats while a request is being served, and is still while the host asks for nothing."""

    def __init__(self, channel: Channel, count: Callable[[], int]) -> None:
        """Prepare; ``start`` starts the thread.

        Args:
            count: grows with every exchange between ranks.
        """
        self._channel = channel
        self._count = count
        self._request: int | None = None
        self._is_busy = threading.Event()

    def start(self) -> None:
        """Start the thread, which lives as long as the process."""
        threading.Thread(target=self._run, name="xdit-heartbeat", daemon=True).start()

    @contextmanager
    def during(self, request: int) -> Iterator[None]:
        """Beat while this lasts, for this request."""
        self._request = request
        self._is_busy.set()
        try:
            yield
        finally:
            self._is_busy.clear()
            self._request = None

    def _run(self) -> None:
        try:
            while True:
                self._is_busy.wait()
                time.sleep(BEAT_S)  # First: most steps are over by then.
                request = self._request
                if request is not None:
                    self._channel.send(Alive(request, self._count()), deadline_s=SEND_DEADLINE_S)
        except (ChannelClosedError, DeadlineExceededError):
            return  # The host is gone or does not read; the serving thread finds out too.
