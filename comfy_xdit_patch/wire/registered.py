"""Memory that a GPU copies from and to by itself, while the CPU goes on.

Runs in: host and worker.

The driver takes any other memory through a buffer of its own, for which the CPU waits.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from typing import Any

import torch

PORTABLE = 1
"""For all devices of this process (``cudaHostRegisterPortable``)."""

log = logging.getLogger("comfy_xdit_patch")


def register(memory: torch.Tensor, owner: object) -> bool:
    """Have the driver lock memory for as long as its owner lives.

    Returns:
        Whether it did. If not, copies work as ever, and the CPU waits for them.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.data_ptr()
    if runtime.cudaHostRegister(address, memory.nbytes, PORTABLE) != 0:
        with contextlib.suppress(RuntimeError):  # The next kernel would report that as its own.
            torch.ones(1, device="cuda").add_(1)
            torch.cuda.synchronize()
        _say_that_it_failed()
        return False
    weakref.finalize(owner, runtime.cudaHostUnregister, address).atexit = False
    return True


@functools.cache
def _say_that_it_failed() -> None:
    log.info("xDiT: the driver locks no shared memory; copies to and from the GPU are waited for")
