"""The one named boundary for our own faults inside ComfyUI's process.

Runs in: host process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from comfy_xdit_patch.errors import FallBackError, TheirError
from comfy_xdit_patch.report.log import is_new

T = TypeVar("T")

log = logging.getLogger("comfy_xdit_patch")


@contextmanager
def our_faults_stay_ours(where: str, *, strict: bool = False) -> Iterator[None]:
    """Log an exception of our own code, once in a prompt, and go on.

    ComfyUI's own call stands outside.

    Args:
        strict: let our faults out too (``XDIT_STRICT=1``).

    Two exceptions pass. The user's interrupt, which is an ordinary ``Exception`` in ComfyUI
    0.3.75 and a ``BaseException`` later. ``FallBackError``, which the user asked for.
    """
    try:
        yield
    except FallBackError:
        raise
    except Exception as error:
        if strict or is_interrupt(error):
            raise
        if is_new(f"{where}: {type(error).__name__}", logging.ERROR):
            log.exception("xDiT: a fault of comfy-xdit-patch in %s; ComfyUI goes on alone", where)


class Attempt(NamedTuple):
    """What our way to compute a call gave: its result, None, or a fault of ours."""

    out: Any
    fault: Exception | None = None


def attempt(call: Callable[[], Any]) -> Attempt:
    """Try our way to compute what ComfyUI would compute otherwise.

    A fault is kept and not said: what makes us fail, such as tensors of a wrong size, may make
    ComfyUI's own code fail too. It is one of ours if ComfyUI succeeds.

    Raises:
        FallBackError: the user asked for errors.
        Exception: the user's interrupt, or what ComfyUI's or a node's own code raised.
    """
    try:
        return Attempt(call())
    except FallBackError:
        raise
    except TheirError as error:
        raised = error.error
    except Exception as error:
        if is_interrupt(error):
            raise
        return Attempt(None, error)
    raise raised  # Out here: as if nobody had caught it.


def theirs(call: Callable[[], T]) -> Callable[[], T]:
    """Mark what a call of ComfyUI's or a node's code raises, so that ``attempt`` lets it out."""

    def marked() -> T:
        try:
            return call()
        except Exception as error:
            if is_interrupt(error):
                raise
            raise TheirError(error) from error

    return marked


def is_interrupt(error: BaseException) -> bool:
    """Whether this is how ComfyUI stops a prompt that the user has cancelled."""
    import comfy.model_management

    return isinstance(error, comfy.model_management.InterruptProcessingException)
