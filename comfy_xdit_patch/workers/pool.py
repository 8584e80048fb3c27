"""Keep one worker for each device, all or none, and carry requests to all of them.

Runs in: host process.

    idle -- start() --> starting -- all joined --> ready
                           ^  |                     |
             back-off, then|  | one failed, or      | one died, failed or hung
                           |  v deadline            v
                          broken <------------------+

Two threads meet here. The keeper, a daemon thread, starts workers and notices deaths while nothing
is asked for; it lives as long as the process, because a worker dies with the *thread* that started
it (PR_SET_PDEATHSIG). The sampling thread sends requests and reads replies. ``_calls`` serialises
requests; ``_changed`` guards the state.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError, WorkerError
from comfy_xdit_patch.planning.topology import Device
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.transport.channel import Channel, wait_readable
from comfy_xdit_patch.transport.messages import Done, Failed, Joined, Message, Reply, Start, Stop
from comfy_xdit_patch.workers.environment import HostState
from comfy_xdit_patch.workers.launcher import Worker, launch_worker, make_log_dir

log = logging.getLogger(__name__)

SEND_DEADLINE_S = 10.0
POLL_S = 0.02
WATCH_S = 0.25
BLAME_S = 0.05
BACK_OFF_S = (0.0, 5.0, 30.0, 120.0)
"""Wait before a restart after workers that had worked were lost; the last value repeats."""
START_BACK_OFF_S = (30.0, 120.0, 600.0)
"""The same after a failed start, which costs the user a wait in every run that tries it."""

Poll = Callable[[], None]
"""Called about every 20 ms in a wait; an exception it raises (an interrupt) ends the wait."""


class PoolState(enum.Enum):
    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    BROKEN = "broken"


class Pool:
    """All workers of this host. Every rank takes part in every request."""

    def __init__(
        self,
        *,
        devices: Sequence[Device],
        host_state: HostState,
        settings: Settings,
    ) -> None:
        """Prepare; nothing is started."""
        self.devices = tuple(devices)
        self.workers: tuple[Worker, ...] = ()
        self.joined: dict[int, Joined] = {}
        self.state = PoolState.IDLE
        self.error: str | None = None
        self.generation = 0
        self.start_seconds = 0.0
        self.control_bytes = 0
        self._host_state = host_state
        self._settings = settings
        self._changed = threading.Condition()
        self._calls = threading.RLock()
        self._keeper: threading.Thread | None = None
        self._log_dir: Path | None = None
        self._num_failures = 0
        self._may_start_at = 0.0
        self._request = 0
        self._outstanding: set[int] = set()

    @property
    def world_size(self) -> int:
        return len(self.devices)

    def start(self) -> None:
        """Have the workers started, in the background. No effect when they live or back off."""
        with self._changed:
            if self.state in (PoolState.IDLE, PoolState.BROKEN) and (
                time.monotonic() >= self._may_start_at
            ):
                self._set_state(PoolState.STARTING)
                if self._keeper is None:
                    self._keeper = threading.Thread(
                        target=self._keep, name="xdit-keeper", daemon=True
                    )
                    self._keeper.start()

    def wait_until_ready(self, poll: Poll) -> None:
        """Wait for a start in progress.

        Raises:
            WorkerError: the workers did not start; the text names rank, phase and cause.
        """
        self.start()
        end = time.monotonic() + self._settings.start_timeout_s + SEND_DEADLINE_S
        while True:
            with self._changed:
                if self.state is PoolState.READY:
                    return
                if self.state is not PoolState.STARTING or time.monotonic() > end:
                    raise WorkerError(self.error or "The workers did not start.")
                self._changed.wait(POLL_S)
            poll()

    def request(
        self,
        message: Callable[[int], Message],
        *,
        poll: Poll,
        prepare: Callable[[], Sequence[tuple[Message, int | None]]] = lambda: (),
    ) -> list[Reply]:
        """Send a request to every rank and return the replies in rank order.

        Args:
            message: makes the request from its number, after ``prepare`` ran.
            prepare: runs when no worker is computing any more, so that it may write to shared
                slots; returns messages to send first, with the file descriptors beside them.

        Raises:
            WorkerError: a rank failed, died or hung. All workers have been ended.
        """
        while not self._calls.acquire(timeout=POLL_S):
            poll()
        try:
            generation = self.generation
            if self.state is not PoolState.READY:
                raise WorkerError(self.error or "The workers are not running.")
            try:
                self._collect(poll)  # Replies to a call that the user interrupted.
                before = prepare()
                self._request += 1
                number = self._request
                for extra, fd in before:
                    self._send_all(extra, fd)
                self._send_all(message(number), None)
                self._outstanding = set(range(self.world_size))
                replies = self._collect(poll)
            except (ChannelClosedError, DeadlineExceededError, WorkerError) as error:
                text = str(error)
                self._break(text, generation)
                raise WorkerError(text) from None
            if isinstance(replies[0], Done):
                self._num_failures = 0
            return [replies[rank] for rank in sorted(replies)]
        finally:
            self._calls.release()

    def stop(self) -> None:
        """End all workers and stay idle."""
        with self._changed:
            workers, self.workers = self.workers, ()
            self._set_state(PoolState.IDLE)
        for worker in workers:
            with contextlib.suppress(ChannelClosedError, DeadlineExceededError):
                worker.channel.send(Stop(), deadline_s=1.0)
        for worker in workers:
            worker.end()

    # -- the sampling thread ---------------------------------------------------------------

    def _send_all(self, message: Message, fd: int | None) -> None:
        for worker in self.workers:
            try:
                self.control_bytes += worker.channel.send(
                    message, deadline_s=SEND_DEADLINE_S, fd=fd
                )
            except ChannelClosedError:
                raise WorkerError(self._death(worker, "between steps")) from None

    def _collect(self, poll: Poll) -> dict[int, Reply]:
        """Wait until no reply is outstanding; return those of the latest request."""
        replies: dict[int, Reply] = {}
        by_channel = {worker.channel: worker for worker in self.workers}
        end = time.monotonic() + self._settings.step_timeout_s
        while self._outstanding:
            waiting = [w.channel for w in self.workers if w.rank in self._outstanding]
            for channel in wait_readable(waiting, timeout_s=POLL_S):
                worker = by_channel[channel]
                reply = self._read(worker)
                if reply is not None and getattr(reply, "request", None) == self._request:
                    replies[worker.rank] = reply  # type: ignore[assignment]
                    self._outstanding.discard(worker.rank)
            if time.monotonic() > end:
                ranks = ", ".join(str(rank) for rank in sorted(self._outstanding))
                raise WorkerError(
                    f"Rank {ranks} did not answer within XDIT_STEP_TIMEOUT="
                    f"{self._settings.step_timeout_s:g} s."
                )
            poll()
        return replies

    def _read(self, worker: Worker) -> Message | None:
        try:
            message = worker.channel.poll()
        except ChannelClosedError:
            raise WorkerError(self._death(worker, "during a request")) from None
        if isinstance(message, Failed):
            # A rank whose peer died fails in its collective and may be heard first: name the dead.
            time.sleep(BLAME_S)
            for other in self.workers:
                if other is not worker and other.process.poll() not in (None, 1):
                    raise WorkerError(self._death(other, "during a request"))
            raise WorkerError(self._failure(worker, message))
        return message

    # -- the keeper's thread ---------------------------------------------------------------

    def _keep(self) -> None:
        while True:
            with self._changed:
                if self.state is not PoolState.STARTING:
                    self._changed.wait(WATCH_S)
                state, generation = self.state, self.generation
            if state is PoolState.STARTING:
                self._start_all()
            elif state is PoolState.READY:
                dead = [w for w in self.workers if w.process.poll() is not None]
                if dead and self._calls.acquire(blocking=False):
                    try:
                        self._break(self._death(dead[0], "while idle"), generation)
                    finally:
                        self._calls.release()
            elif state is PoolState.BROKEN and self.generation > 0:
                self.start()  # It worked once on this machine: bring it back for the next run.

    def _start_all(self) -> None:
        begin = time.monotonic()
        workers: list[Worker] = []
        store_fd = os.memfd_create("comfy-xdit-store")
        try:
            self._log_dir = self._log_dir or make_log_dir()
            for rank, device in enumerate(self.devices):
                workers.append(
                    launch_worker(
                        rank=rank,
                        device=device,
                        store_fd=store_fd,
                        cpu_threads=self._settings.cpu_threads,
                        log_dir=self._log_dir,
                    )
                )
            for worker in workers:
                worker.channel.send(
                    self._start_message(worker, store_fd), deadline_s=SEND_DEADLINE_S
                )
            joined = self._join_all(workers, begin + self._settings.start_timeout_s)
        except (ChannelClosedError, DeadlineExceededError, WorkerError, OSError) as error:
            for worker in workers:
                worker.end(grace_s=0)
            with self._changed:
                self._fail(f"The workers did not start. {error}", START_BACK_OFF_S)
            return
        finally:
            os.close(store_fd)
        with self._changed:
            self.workers, self.joined = tuple(workers), joined
            self._outstanding.clear()
            self.generation += 1
            self.start_seconds = time.monotonic() - begin
            self.error = None
            self._set_state(PoolState.READY)
        log.info("xDiT: %d workers joined in %.1f s", self.world_size, self.start_seconds)

    def _start_message(self, worker: Worker, store_fd: int) -> Start:
        host = self._host_state
        return Start(
            comfyui_root=host.comfyui_root,
            sys_path=host.sys_path,
            argv=host.argv,
            parses_arguments=host.parses_arguments,
            arguments=host.arguments,
            num_threads=self._settings.cpu_threads if worker.device.is_cpu else None,
            world_size=self.world_size,
            store_fd=store_fd,
            join_timeout_s=self._settings.start_timeout_s,
            step_timeout_s=self._settings.step_timeout_s,
        )

    def _join_all(self, workers: Sequence[Worker], end: float) -> dict[int, Joined]:
        joined: dict[int, Joined] = {}
        by_channel: dict[Channel, Worker] = {worker.channel: worker for worker in workers}
        while len(joined) < len(workers):
            missing = [worker for worker in workers if worker.rank not in joined]
            for channel in wait_readable([w.channel for w in missing], timeout_s=POLL_S):
                worker = by_channel[channel]
                try:
                    message = worker.channel.poll()
                except ChannelClosedError:
                    raise WorkerError(self._death(worker, "during its start")) from None
                if isinstance(message, Failed):
                    raise WorkerError(self._failure(worker, message))
                if isinstance(message, Joined):
                    joined[worker.rank] = message
            if time.monotonic() > end and missing:
                names = ", ".join(f"rank {worker.rank}" for worker in missing)
                raise WorkerError(
                    f"{names} did not join within XDIT_START_TIMEOUT="
                    f"{self._settings.start_timeout_s:g} s. Last lines of {missing[0].log_path}:\n"
                    f"{missing[0].log_tail()}"
                )
        return joined

    # -- either thread ---------------------------------------------------------------------

    def _break(self, reason: str, generation: int) -> None:
        """End all workers of a generation: half a world computes nothing."""
        with self._changed:
            if self.generation != generation or self.state is not PoolState.READY:
                return
            workers, self.workers = self.workers, ()
            self._outstanding.clear()
            self._fail(reason, BACK_OFF_S)
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.end(grace_s=0)

    def _fail(self, reason: str, back_off_s: Sequence[float]) -> None:
        self.error = reason
        delay_s = back_off_s[min(self._num_failures, len(back_off_s) - 1)]
        self._may_start_at = time.monotonic() + delay_s
        self._num_failures += 1
        self._set_state(PoolState.BROKEN)
        log.error("xDiT: %s", reason)

    def _set_state(self, state: PoolState) -> None:
        self.state = state
        self._changed.notify_all()

    @staticmethod
    def _death(worker: Worker, when: str) -> str:
        with contextlib.suppress(Exception):
            worker.process.wait(timeout=1.0)
        return (
            f"Rank {worker.rank} (pid {worker.process.pid}, {worker.device.name}) "
            f"{worker.exit_text()} {when}. Last lines of {worker.log_path}:\n{worker.log_tail()}"
        )

    @staticmethod
    def _failure(worker: Worker, message: Failed) -> str:
        return (
            f"Rank {worker.rank} ({worker.device.name}) failed in {message.phase}: "
            f"{message.error}\nTraceback from rank {worker.rank}:\n{message.traceback}"
        )
