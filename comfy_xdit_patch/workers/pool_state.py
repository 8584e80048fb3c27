"""What a pool of workers can be in; ``pool.py`` has the picture.

Runs in: host process.
"""

from __future__ import annotations

import enum


class PoolState(enum.Enum):
    """The state of all workers together."""

    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    BROKEN = "broken"
