"""CPU ranks that a script forks, so that torch is imported once.

Runs in: the script's process, and its ranks; no ComfyUI.
"""

from __future__ import annotations

import datetime
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist


def run_and_exit(main: Callable[..., None], world_size: int, *given: Any) -> NoReturn:
    """Run ``main(rank, *given)`` in every rank, and end as the worst of them did.

    Threads do not survive a fork: the script sets torch's to one before anything computes.
    """
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=main, args=(rank, *given)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


@contextmanager
def met(rank: int, world_size: int, folder: Path, timeout: datetime.timedelta) -> Iterator[None]:
    """Meet the other ranks over gloo, by a file in a folder, and leave them at the end."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    yield
    dist.destroy_process_group()
