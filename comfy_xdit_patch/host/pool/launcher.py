"""Start one worker process on this machine, and end it.

Runs in: host process.

The seam for other launchers: a pool needs nothing of a worker but what ``Worker`` offers.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool.inheritance import worker_variables
from comfy_xdit_patch.host.pool.log_files import begin, tail_of
from comfy_xdit_patch.host.pool.nursing import Nursery, RankProcess
from comfy_xdit_patch.wire.channel import Channel
from comfy_xdit_patch.wire.messages.requests import Stop

log = logging.getLogger(__name__)

GRACE_S = 2.0
KILL_S = 10.0
"""A process inside a driver that hangs cannot be killed, and must not keep ComfyUI waiting."""


@dataclass(slots=True)
class Worker:
    """One worker process, as the host sees it."""

    rank: int
    device: Device
    process: RankProcess
    channel: Channel
    log_path: Path

    def exit_text(self) -> str:
        """How the process ended, in words."""
        code = self.process.poll()
        if code is None:
            return "is alive"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def log_tail(self) -> str:
        """The last lines of the worker's log."""
        return tail_of(self.log_path)


def dismiss_workers(workers: Sequence[Worker]) -> None:
    """Tell all of them to leave, and see to it that they do."""
    for worker in workers:
        with contextlib.suppress(ChannelClosedError, DeadlineExceededError):
            worker.channel.send(Stop(), deadline_s=1.0)
    end_workers(workers)


def end_workers(workers: Sequence[Worker], *, grace_s: float = GRACE_S) -> None:
    """Wait a little for all of them to end by themselves, then kill those that have not."""
    _wait_for(workers, grace_s)
    for worker in workers:
        worker.process.kill()
    _wait_for(workers, KILL_S)
    for worker in workers:
        worker.channel.close()
        if worker.process.poll() is None:
            log.error(
                "xDiT: Rank %d (pid %d, %s) does not end although it was killed",
                worker.rank,
                worker.process.pid,
                worker.device.name,
            )


def _wait_for(workers: Sequence[Worker], seconds: float) -> None:
    end = time.monotonic() + seconds
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=max(0.0, end - time.monotonic()))


def launch_worker(
    *,
    rank: int,
    device: Device,
    shared_fds: Sequence[int],
    cpu_threads: int,
    log_dir: Path,
    nursery: Nursery,
    end: float,
    peer_to_peer: bool = True,
) -> Worker:
    """Have the nursery fork a worker.

    Args:
        shared_fds: files without a name that all ranks share: of the store, of the mailboxes.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    log_path = log_dir / f"worker-{rank}.log"
    variables = worker_variables(device, cpu_threads=cpu_threads, peer_to_peer=peer_to_peer)
    with theirs, begin(log_path) as log_file:
        fds = [theirs.fileno(), *shared_fds, log_file.fileno()]
        process = nursery.fork(rank, variables, fds, end)
    return Worker(rank, device, process, Channel(ours, takes_fds=False), log_path)
