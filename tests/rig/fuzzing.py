"""What the tests with broken messages share.

Runs in: the tests.

``FUZZ_MESSAGES`` multiplies the number of inputs (1, and 10 with ``--all``); ``FUZZ_FIRST`` is the
first seed. A failure names its seed, so that it can be run alone.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from comfy_xdit_patch.errors import XditError
from rig.breadth import how_many

T = TypeVar("T")

TIMES = how_many(1, whole=10, variable="FUZZ_MESSAGES")
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
MAX_GROWTH_KB = 300 << 10


def seeds(number: int) -> range:
    """Return the seeds of a test that tries so many inputs by default."""
    return range(FIRST, FIRST + number * TIMES)


@contextmanager
def named(seed: int, what: object) -> Iterator[None]:
    """Say which input it was that led to an exception."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"FUZZ_FIRST={seed}: {str(what)[:400]}: {error!r}") from error


def outcome_of(call: Callable[[], T]) -> T | XditError:
    """Return what a call returns, or the exception of ours that it raises."""
    try:
        return call()
    except XditError as error:
        return error


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """No descriptor is left by any input, memory stays within bounds, nothing is said."""
    before = len(os.listdir("/proc/self/fd"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < MAX_GROWTH_KB
