"""Put an attribute on an object for a while.

Runs in: host and worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def own_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own, in front of its class's, while this lasts."""
    had_own = name in vars(owner)
    before = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had_own:
            vars(owner)[name] = before
        else:
            del vars(owner)[name]
