"""The one named boundary for our own faults inside ComfyUI's process.

Runs in: host process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from comfy_xdit_patch.errors import FallBackError, NodeError
from comfy_xdit_patch.observability.log import is_heard

log = logging.getLogger("comfy_xdit_patch")
_said: set[str] = set()


@contextmanager
def our_faults_stay_ours(where: str, *, strict: bool = False) -> Iterator[None]:
    """Log an exception of our own code and go on; ComfyUI's own call stands outside.

    Args:
        strict: let our faults out too (``XDIT_STRICT=1``).

    Three exceptions pass. The user's interrupt, which is an ordinary ``Exception`` in ComfyUI
    0.3.75 and a ``BaseException`` later. ``FallBackError``, which the user asked for. What a node's
    own code raised while it ran inside of ours.
    """
    try:
        yield
    except FallBackError:
        raise
    except NodeError as error:
        raise error.original from None
    except Exception as error:
        if strict or is_interrupt(error):
            raise
        key = f"{where}: {type(error).__name__}"
        if key not in _said:
            if is_heard(logging.ERROR):
                _said.add(key)
            log.exception("xDiT: a fault of comfy-xdit-patch in %s; ComfyUI goes on alone", where)


def is_interrupt(error: BaseException) -> bool:
    """Whether it is the user's interrupt."""
    import comfy.model_management

    return isinstance(error, comfy.model_management.InterruptProcessingException)
