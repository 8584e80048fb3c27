"""Do what must not meet a sampling run: at once, or when what runs has ended.

Runs in: host process. Prompts run in ComfyUI's thread for them, requests are answered in others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from comfy_xdit_patch.host.boundary import our_faults_stay_ours


class Between:
    """The times at which nothing of ComfyUI's runs that could call us."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._num_busy = 0
        self._waiting: dict[str, tuple[Callable[[], None], Any]] = {}

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep everything else waiting meanwhile, and do at the end what waits."""
        with self._lock:
            self._num_busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_busy -= 1
                if not self._num_busy:
                    self._do_what_waits()

    def do(self, name: str, action: Callable[[], None], what: Any = None) -> bool:
        """Do it now, unless something runs: then it waits, in the place of what waits by this name.

        Returns:
            Whether it is done.
        """
        with self._lock:
            if self._num_busy:
                self._waiting[name] = action, what
                return False
            action()
            return True

    def unless_busy(self, action: Callable[[], None]) -> None:
        """Do it now, or not at all if something runs. What begins meanwhile waits."""
        with self._lock:
            if not self._num_busy:
                action()

    def _do_what_waits(self) -> None:
        try:
            for name, (action, _) in self._waiting.items():
                with our_faults_stay_ours(name):
                    action()
        finally:
            self._waiting.clear()  # Not earlier: whoever asks is told that it waits.

    def waiting(self, name: str) -> Any:
        """``what`` waits by this name, or None."""
        _, what = self._waiting.get(name, (None, None))
        return what
