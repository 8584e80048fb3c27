"""The request to measure the machine, and what a rank says to it.

Runs in: host and worker. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Probe:
    """Measure this rank's speed and the links between all ranks, in about so many seconds."""

    request: int
    budget_s: float


@dataclass(frozen=True, slots=True)
class Probed:
    """What a rank measured.

    ``together`` are its rates while all ranks measure theirs, ``alone`` those of rank 0 while the
    others wait (empty for the others); names in ``engine/calibration.py``. ``exchanges`` has
    pairs of bytes sent and seconds by form and grouping, ``all_to_all 2 1``:
    ``planning/link_timing.py``.
    """

    request: int
    together: dict[str, float]
    alone: dict[str, float]
    exchanges: dict[str, list[list[float]]]
    seconds: float


@dataclass(frozen=True, slots=True)
class NotProbed:
    """A rank could not measure, and is well otherwise; no rank has measured."""

    request: int
    error: str
