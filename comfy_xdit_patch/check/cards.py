"""How much memory of each card is used, as ``nvidia-smi`` has it: by all processes together.

Runs in: the check's process, and a thread of it.
"""

from __future__ import annotations

import threading
from types import TracebackType

from comfy_xdit_patch.hardware.survey import ASK_S, query_gpus

POLL_S = 0.2
MEMORY = "uuid,memory.used,memory.total"
MIB = 1 << 20


def used_bytes() -> dict[str, int]:
    """Return the bytes used on each card, by UUID; empty where nvidia-smi does not say."""
    used = {}
    for row in query_gpus(MEMORY):
        if len(row) == 3 and row[1].isdecimal():
            used[row[0]] = int(row[1]) * MIB
    return used


class MemoryWatch:
    """Looks at all cards about every 0.2 s, from ``with`` to its end."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        """The most bytes that a look found used, by UUID."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="xdit-check-memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join(ASK_S)

    def _look(self) -> None:
        while not self._closing.is_set():
            found = used_bytes()
            self.most |= {uuid: max(used, self.most.get(uuid, 0)) for uuid, used in found.items()}
            self._closing.wait(POLL_S)
