"""Make a process slower by a known factor: stop it and let it go on, many times a second.

Runs in: the tests.

Of every period the process may run a part, whatever else the machine does; a program that competes
for its core would get more of it whenever the process waits for something.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType

PERIOD_S = 0.008


class Slowed:
    """One process at ``speed`` of its own, while this lasts."""

    def __init__(self, pid: int, speed: float) -> None:
        self._pid, self._speed = pid, speed
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Slowed:
        self._thread.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        # By the clock: the turns that a late wake-up makes longer are made shorter next.
        stopped_s = ran_s = 0.0
        try:
            while not self._is_over.is_set():
                begin = time.perf_counter()
                os.kill(self._pid, signal.SIGSTOP)
                owed = (ran_s + PERIOD_S * self._speed) * (1 - self._speed) / self._speed
                time.sleep(max(0.0, owed - stopped_s))
                os.kill(self._pid, signal.SIGCONT)
                middle = time.perf_counter()
                stopped_s += middle - begin
                time.sleep(PERIOD_S * self._speed)
                ran_s += time.perf_counter() - middle
        finally:
            os.kill(self._pid, signal.SIGCONT)
