"""CPU ranks of a benchmark: processes of one thread that meet over gloo, each bound to a core.

Runs in: the rig's environment.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rig.environment import RigError

MEET_DEADLINE = datetime.timedelta(seconds=300)
POLL_S = 0.05
CONTEXT = multiprocessing.get_context("spawn")


class Ranks:
    """Ranks at work."""

    def __init__(self, processes: list[Any], folder: Path) -> None:
        self._processes = processes
        self._folder = folder

    def results(self, deadline_s: float) -> list[Any]:
        """Wait for all of them; return what each one's body returned.

        Raises:
            RigError: one of them failed, or has not ended by then.
        """
        end = time.monotonic() + deadline_s
        while any(process.is_alive() for process in self._processes):
            codes = [process.exitcode for process in self._processes]
            if any(codes) or time.monotonic() > end:
                break
            time.sleep(POLL_S)
        codes = [process.exitcode for process in self._processes]
        if codes != [0] * len(codes):
            raise RigError(
                f"ranks ended with codes {codes}; None: had not ended, {deadline_s:g} s at most."
            )
        return [
            json.loads((self._folder / f"{rank}.json").read_text()) for rank in range(len(codes))
        ]


@contextmanager
def running(num_ranks: int, body: Callable[..., Any], *args: Any) -> Iterator[Ranks]:
    """Start ranks that run ``body(rank, *args)``, a function of a module; end them at the end.

    What the body returns must be JSON. ``torch.distributed`` is initialised when it is called.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_run, args=(rank, num_ranks, folder, body, args))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            yield Ranks(processes, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def on_ranks(num_ranks: int, body: Callable[..., Any], *args: Any, deadline_s: float) -> list[Any]:
    """Run a body on ranks to its end; return what it returned on each."""
    with running(num_ranks, body, *args) as ranks:
        return ranks.results(deadline_s)


@contextmanager
def shared_memory() -> Iterator[str]:
    """A path of a file without a name, for ranks of this process."""
    fd = os.memfd_create("mailboxes")
    yield f"/proc/{os.getpid()}/fd/{fd}"
    os.close(fd)


def mailboxes_at(path: str, rank: int, num_ranks: int) -> Any:
    """A rank's mailboxes, ready on all ranks."""
    import torch.distributed as dist

    from comfy_xdit_patch.worker.ranks.mailboxes import Mailboxes

    fd = os.open(path, os.O_RDWR)
    made = Mailboxes(fd, rank=rank, world_size=num_ranks, timeout_s=MEET_DEADLINE.total_seconds())
    os.close(fd)
    dist.barrier()
    return made


def _run(
    rank: int, num_ranks: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Libraries would take a GPU for the ranks' device.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=MEET_DEADLINE,
    )
    with torch.inference_mode():
        found = body(rank, *args)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
