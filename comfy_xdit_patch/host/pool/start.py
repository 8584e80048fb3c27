"""Start one worker for each device and wait until all have joined: all or none.

Runs in: host process, in the keeper's thread.

NCCL over peer-to-peer hangs or fails on some boards, and on some it brings other data: the IOMMU,
or the access control of PCIe switches (ACS), redirects what one GPU writes into another one's
memory. Nothing tells but the first exchange itself. Through CPU memory it works on all of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from comfy_xdit_patch.errors import ChannelClosedError, ExchangeError, WorkerError, XditError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool.inheritance import HostState, is_peer_to_peer_off, worker_variables
from comfy_xdit_patch.host.pool.launcher import Worker, end_workers, launch_worker
from comfy_xdit_patch.host.pool.log_files import LogDirectory
from comfy_xdit_patch.host.pool.nursing import Nursery
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.wire.channel import Channel, wait_readable
from comfy_xdit_patch.wire.messages.replies import Failed, Joined, Joining, short
from comfy_xdit_patch.wire.messages.requests import Start

SEND_DEADLINE_S = 10.0
POLL_S = 0.02
BLAME_S = 0.05
DUMP_S = 0.2
FIRST_EXCHANGE_S = 60.0
"""NCCL connects all GPUs in it, which takes seconds where it works."""
MAX_TRACEBACK_CHARS = 20_000
STATES = {
    "R": "is running",
    "S": "is waiting",
    "D": "is waiting for a disk or a driver",
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
    "Z": "is dead",
}


@dataclass(frozen=True, slots=True)
class Started:
    """Workers that have all joined, in rank order."""

    workers: tuple[Worker, ...]
    joined: dict[int, Joined]
    seconds: float


def start_workers(
    devices: Sequence[Device],
    *,
    host_state: HostState,
    settings: Settings,
    log_dir: Path,
    nursery: Nursery,
    end: float,
    peer_to_peer: bool,
    is_last: bool,
) -> Started:
    """Start all ranks at once, then wait for all of them under one deadline.

    Args:
        end: the deadline, on the monotonic clock.
        peer_to_peer: whether NCCL may use it.
        is_last: otherwise half of the time left is kept from the first exchange between ranks,
            for another start.

    Raises:
        ExchangeError: all ranks met, and could not exchange data. None is left running.
        XditError: a rank is missing; none is left running. The text names rank, phase and
            cause, or the last lines of its log.
        OSError: the system has no process, memory or descriptor for them.
    """
    begin = time.monotonic()
    workers: list[Worker] = []
    shared_fds = []
    try:
        for name in ("comfy-xdit-store", "comfy-xdit-mailboxes"):
            shared_fds.append(os.memfd_create(name))
        for rank, device in enumerate(devices):
            workers.append(
                launch_worker(
                    rank=rank,
                    device=device,
                    shared_fds=shared_fds,
                    cpu_threads=settings.cpu_threads,
                    log_dir=log_dir,
                    nursery=nursery,
                    end=end,
                    peer_to_peer=peer_to_peer,
                )
            )
        for worker in workers:
            start = start_message(host_state, settings, worker.device, len(devices))
            worker.channel.send(start, deadline_s=SEND_DEADLINE_S)
        joined = _join_all(workers, end, settings.start_timeout_s, is_last=is_last)
    except BaseException:
        end_workers(workers, grace_s=0)
        raise
    finally:
        for fd in shared_fds:
            os.close(fd)
    return Started(tuple(workers), joined, time.monotonic() - begin)


def start_message(
    host_state: HostState, settings: Settings, device: Device, world_size: int
) -> Start:
    """What a rank of that device is told first, and what the nursery imports by."""
    return Start(
        comfyui_root=host_state.comfyui_root,
        sys_path=host_state.sys_path,
        argv=host_state.argv,
        parses_arguments=host_state.parses_arguments,
        arguments=host_state.arguments,
        num_threads=settings.cpu_threads if device.is_cpu else None,
        world_size=world_size,
        join_timeout_s=settings.start_timeout_s,
        step_timeout_s=settings.step_timeout_s,
        transfer_dtype=settings.transfer_dtype,
    )


def _join_all(
    workers: Sequence[Worker], end: float, timeout_s: float, *, is_last: bool = True
) -> dict[int, Joined]:
    joined: dict[int, Joined] = {}
    joining: set[int] = set()
    exchange_s = math.inf
    exchange_end = math.inf
    by_channel: dict[Channel, Worker] = {worker.channel: worker for worker in workers}
    while len(joined) < len(workers):
        missing = [worker for worker in workers if worker.rank not in joined]
        for channel in wait_readable([w.channel for w in missing], timeout_s=POLL_S):
            worker = by_channel[channel]
            try:
                message = channel.poll()
            except ChannelClosedError:
                raise _dead(worker, joining) from None
            if isinstance(message, Failed):
                if worker.rank not in joining:
                    raise WorkerError(failure_text(worker, message))
                lost = dead_among(workers, worker)
                raise _dead(lost, joining) if lost else ExchangeError(failure_text(worker, message))
            if isinstance(message, Joining):
                joining.add(worker.rank)
                if len(joining) == len(workers):
                    left_s = end - time.monotonic()
                    exchange_s = min(FIRST_EXCHANGE_S, left_s if is_last else left_s / 2)
                    exchange_end = time.monotonic() + exchange_s
            if isinstance(message, Joined):
                if (message.rank, message.pid) != (worker.rank, worker.process.pid):
                    raise WorkerError(
                        f"Rank {worker.rank} (pid {worker.process.pid}) says that it is rank "
                        f"{message.rank} (pid {message.pid})."
                    )
                joined[worker.rank] = message
        for worker in missing:
            if worker.rank not in joined and is_dead_and_silent(worker):
                raise _dead(worker, joining)
        if time.monotonic() > exchange_end and len(joined) < len(workers):
            late = next(worker for worker in workers if worker.rank not in joined)
            ask_where_it_is(late)
            raise ExchangeError(hang_text(late, f"did not exchange data within {exchange_s:.0f} s"))
        if time.monotonic() > end and len(joined) < len(workers):
            missing = [worker for worker in workers if worker.rank not in joined]
            names = ", ".join(f"rank {worker.rank}" for worker in missing)
            raise WorkerError(
                f"{names} did not join within XDIT_START_TIMEOUT={timeout_s:g} s. "
                f"Last lines of {missing[0].log_path}:\n{missing[0].log_tail()}"
            )
    return joined


def _dead(worker: Worker, joining: Collection[int]) -> WorkerError:
    if worker.rank in joining:
        return ExchangeError(death_text(worker, "in the first exchange between ranks"))
    return WorkerError(death_text(worker, "during its start"))


def dead_among(workers: Sequence[Worker], worker: Worker) -> Worker | None:
    """Return a worker that died, where another one reports a failure.

    A rank whose peer died fails in its collective and may be heard first.
    """
    time.sleep(BLAME_S)
    others = (other for other in workers if other is not worker)
    return next((other for other in others if other.process.poll() not in (None, 1)), None)


def ask_where_it_is(worker: Worker) -> None:
    """Have a worker that hangs write into its log where it is."""
    with contextlib.suppress(ProcessLookupError):
        worker.process.send_signal(signal.SIGUSR1)
    time.sleep(DUMP_S)


def is_dead_and_silent(worker: Worker) -> bool:
    """Whether a process has ended and everything that it said was read.

    A dead worker's channel reports its end, but not while somebody else holds it open: a process
    that another extension forked from ComfyUI in the moment in which the worker was started.
    """
    is_dead = worker.process.poll() is not None
    return is_dead and not wait_readable([worker.channel], timeout_s=0)


def death_text(worker: Worker, when: str) -> str:
    """Say how a worker ended."""
    with contextlib.suppress(Exception):  # The channel closes a moment before the process ends.
        worker.process.wait(timeout=1.0)
    return (
        f"Rank {worker.rank} (pid {worker.process.pid}, {worker.device.name}) "
        f"{worker.exit_text()} {when}. Last lines of {worker.log_path}:\n{worker.log_tail()}"
    )


def hang_text(worker: Worker, why: str) -> str:
    """Say which worker hangs, what its process does, and where it is, as its log has it."""
    pid = worker.process.pid
    return (
        f"Rank {worker.rank} (pid {pid}, {worker.device.name}) {why}; its process "
        f"{process_state(pid)}. Last lines of {worker.log_path}:\n{worker.log_tail()}"
    )


def process_state(pid: int) -> str:
    """What the kernel says that a process does, in words."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "is gone"
    return STATES.get(letter, f"is in state {letter}")


def failure_text(worker: Worker, message: Failed) -> str:
    """Say what a worker reported of its own failure."""
    # A kernel that fails is heard of at the next wait for the GPU.
    late = "" if worker.device.is_cpu else " or shortly before"
    return (
        f"Rank {worker.rank} ({worker.device.name}) failed in {short(message.phase)}{late}: "
        f"{short(message.error)}\nTraceback from rank {worker.rank}:\n"
        f"{message.traceback[-MAX_TRACEBACK_CHARS:]}"
    )


log = logging.getLogger(__name__)


class Starter:
    """Starts the ranks of this host, again and again, from one nursery."""

    def __init__(
        self, devices: Sequence[Device], *, host_state: HostState, settings: Settings
    ) -> None:
        self.no_peer_to_peer: str | None = None
        """Why these devices do without, once a start found that they must."""
        self._devices = devices
        self._host_state = host_state
        self._settings = settings
        self._logs = LogDirectory(settings.log_dir)
        self._nursery: Nursery | None = None

    def get_ready(self) -> Nursery:
        """Have a nursery import what ranks need. It ends with the thread that calls this.

        Raises:
            OSError: the system has no process, memory or descriptor for it.
            WorkerError: there is no place for its log.
        """
        if self._nursery is None or not self._nursery.is_alive:
            self.close()
            device = self._devices[0]
            self._nursery = Nursery(
                log_path=self._logs.get() / "nursery.log",
                environment=worker_variables(device, cpu_threads=1),
                warm_up=start_message(self._host_state, self._settings, device, 1),
            )
        return self._nursery

    def start(self) -> Started:
        """Start all ranks, twice at most, under one deadline.

        Raises:
            WorkerError: they did not start; none is left running. The text has every cause.
        """
        begin = time.monotonic()
        reason = self.no_peer_to_peer
        end = begin + self._settings.start_timeout_s
        try:
            if reason is None:
                nursery = self.get_ready()
                try:
                    return self._start(end, peer_to_peer=True, is_last=is_peer_to_peer_off())
                except ExchangeError as error:
                    if is_peer_to_peer_off() or not nursery.is_alive:
                        raise  # What ended the nursery ended the ranks: no fault of the exchange.
                    reason = str(error)
                    log.warning(
                        "xDiT: the workers cannot exchange data and are started again without "
                        "peer-to-peer (NCCL_P2P_DISABLE=1). %s",
                        error,
                    )
            started = self._start(end, peer_to_peer=False, is_last=True)
        except (XditError, OSError) as error:
            if reason is None:
                raise WorkerError(f"The workers did not start. {error}") from None
            raise WorkerError(
                f"The workers did not start. {error}\n"
                f"That was without peer-to-peer, because of this before: {reason}"
            ) from None
        self.no_peer_to_peer = reason
        return replace(started, seconds=time.monotonic() - begin)

    def change(self, devices: Sequence[Device], settings: Settings) -> None:
        """What is started next may be other devices, of the same kind, or under other settings."""
        if settings is not self._settings:
            self.no_peer_to_peer = None
        self._devices, self._settings = devices, settings

    def close(self) -> None:
        """End the nursery, and with it all ranks that are left."""
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def _start(self, end: float, *, peer_to_peer: bool, is_last: bool) -> Started:
        nursery = self.get_ready()
        return start_workers(
            self._devices,
            host_state=self._host_state,
            settings=self._settings,
            log_dir=self._logs.get(),
            nursery=nursery,
            end=end,
            peer_to_peer=peer_to_peer,
            is_last=is_last,
        )
