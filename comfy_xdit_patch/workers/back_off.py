"""When to start workers again after they were lost.

Runs in: host process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

AFTER_LOSS_S = (0.0, 5.0, 30.0, 120.0)
"""Wait before a restart after workers that had worked were lost; the last value repeats."""
AFTER_START_S = (30.0, 120.0, 600.0)
"""The same after a failed start, which costs the user a wait in every run that tries it."""


class BackOff:
    """Waits that get longer with every failure since the last run that went well.

    A single step that went well would not do to forget them: a model that is too large for a card
    loses a worker in every run, some steps after its start.
    """

    def __init__(self) -> None:
        self._num_failures = 0
        self._end = 0.0

    @property
    def is_over(self) -> bool:
        """Whether workers may be started."""
        return time.monotonic() >= self._end

    def failed(self, waits_s: Sequence[float]) -> None:
        """Begin a wait: one of ``AFTER_LOSS_S`` or ``AFTER_START_S``."""
        self._end = time.monotonic() + waits_s[min(self._num_failures, len(waits_s) - 1)]
        self._num_failures += 1

    def succeeded(self) -> None:
        """A whole run went well."""
        self._num_failures = 0
