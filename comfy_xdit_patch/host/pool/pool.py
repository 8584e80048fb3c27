"""Keep one worker for each device, all or none.

Runs in: host process.

    idle -- start() --> starting -- all joined --> ready
                           ^  |                     |
             back-off, then|  | one failed, or      | one died, failed or hung
                           |  v deadline            v
                          broken <------------------+

Ranks that nobody used for ``XDIT_IDLE_TIMEOUT`` end, and the state is idle again.

Two threads meet here. The keeper, a daemon thread, starts workers and notices deaths; it lives as
long as the process, because the nursery dies with the *thread* that started it (PR_SET_PDEATHSIG).
The sampling thread has turns with the crew that is ready; the crew's lock serialises them.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
import time
from collections.abc import Callable, Sequence

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool.crew import Crew, device_word
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.pool.inheritance import HostState
from comfy_xdit_patch.host.pool.launcher import dismiss_workers, end_workers
from comfy_xdit_patch.host.pool.start import POLL_S, SEND_DEADLINE_S, Starter
from comfy_xdit_patch.settings import Settings

WATCH_S = 0.1
AFTER_LOSS_S = (0.0, 5.0, 30.0, 120.0)
"""Wait before a restart after workers that had worked were lost; the last value repeats."""
AFTER_START_S = (30.0, 120.0, 600.0)
"""The same after a failed start, which costs the user a wait in every run that tries it."""


class PoolState(enum.Enum):
    """The state of all workers together."""

    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    BROKEN = "broken"


log = logging.getLogger(__name__)


class Pool:
    """All workers of this host. Every rank takes part in every request."""

    def __init__(
        self,
        *,
        devices: Sequence[Device],
        host_state: HostState,
        settings: Settings,
        unless_busy: Callable[[Callable[[], None]], None],
    ) -> None:
        """Prepare; nothing is started.

        Args:
            unless_busy: does something now, and nobody begins to use the workers meanwhile; or
                leaves it, because somebody could be using them.
        """
        self.devices = tuple(devices)
        self.crew: Crew | None = None
        """The ranks that live now, if the state is ready."""
        self.state = PoolState.IDLE
        self.error: str | None = None
        self.start_seconds = 0.0
        self.start_since_s = 0.0
        """When the last start began, on the monotonic clock."""
        self.num_restarts = 0
        """Of the workers, after a loss."""
        self._settings = settings
        self._unless_busy = unless_busy
        self._changed = threading.Condition()
        self._keeper: threading.Thread | None = None
        self._starter = Starter(self.devices, host_state=host_state, settings=settings)
        self._back_off = BackOff()
        self._has_worked = False

    @property
    def world_size(self) -> int:
        return len(self.devices)

    @property
    def device_word(self) -> str:
        """What the ranks run on, for people."""
        return device_word(self.devices)

    @property
    def no_peer_to_peer(self) -> str | None:
        """Why these devices exchange data through CPU memory; None where they need not."""
        return self._starter.no_peer_to_peer

    def get_ready(self) -> None:
        """Have imported, in the background, what a start needs."""
        with self._changed:
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="xdit-keeper", daemon=True)
                self._keeper.start()

    def start(self) -> None:
        """Have the workers started, in the background. No effect when they live or back off."""
        with self._changed:
            is_down = self.state in (PoolState.IDLE, PoolState.BROKEN)
            if is_down and self._back_off.is_over and not self._settings.is_off:
                self.start_since_s = time.monotonic()
                self._set_state(PoolState.STARTING)
                self.get_ready()

    def wait_until_ready(self, poll: Poll) -> Crew:
        """Return the ranks that live now; wait for a start in progress.

        Raises:
            WorkerError: the workers did not start; the text names rank, phase and cause.
        """
        self.start()
        end = time.monotonic() + self._settings.start_timeout_s + SEND_DEADLINE_S
        while True:
            with self._changed:
                if self.crew is not None:
                    return self.crew
                if self.state is not PoolState.STARTING or time.monotonic() > end:
                    raise WorkerError(self.error or "The workers did not start.")
                self._changed.wait(POLL_S)
            poll()

    def used(self) -> None:
        """Somebody was done now with what the workers are there for."""
        crew = self.crew
        if crew is not None:
            crew.used_s = time.monotonic()

    def run_succeeded(self) -> None:
        """A whole run went well: the losses before it do not count any more."""
        self._back_off.succeeded()

    def change(self, devices: Sequence[Device], settings: Settings) -> bool:
        """Go on with other devices, or under other settings.

        Workers that would be started the same go on. Others end, and those that are to be in their
        place start at once. The nursery stays, unless the settings switch off.

        Returns:
            Whether the workers go on.
        """
        with self._changed:
            was_up = self.state in (PoolState.STARTING, PoolState.READY)
            is_new = was_up or self._settings.is_off
            if was_up and not settings.is_off and self._is_asked_for(tuple(devices), settings):
                self._settings = settings
                return True
            crew = self._leave_crew()
            self.devices, self._settings = tuple(devices), settings
            self.error, self._back_off = None, BackOff()
        if crew is not None:
            dismiss_workers(crew.workers)
        if is_new:
            self.start()
        return False

    def stop(self) -> None:
        """End all workers and the nursery, and stay idle."""
        self.dismiss()
        self._starter.close()

    def dismiss(self) -> None:
        """End all workers, and stay idle. The nursery stays."""
        with self._changed:
            crew = self._leave_crew()
        if crew is not None:
            dismiss_workers(crew.workers)

    def _leave_crew(self) -> Crew | None:
        crew, self.crew = self.crew, None
        if crew is not None:
            crew.lost = ""
        self._has_worked = False  # Those that start next make up for no loss.
        self._set_state(PoolState.IDLE)
        return crew

    # -- the keeper's thread ---------------------------------------------------------------

    def _keep(self) -> None:
        with contextlib.suppress(OSError, WorkerError):  # A start tries again, and reports it.
            self._starter.get_ready()
        while True:
            try:
                self._keep_once()
            except Exception as error:
                # Without this thread nothing would be started or noticed any more.
                log.exception("xDiT: a fault of comfy-xdit-patch in the keeper's thread")
                reason = f"{type(error).__name__}: {error}"
                with self._changed:
                    crew = self.crew
                    if crew is None:
                        self._fail(reason, AFTER_START_S)
                if crew is not None:
                    self._lose(crew, reason)

    def _keep_once(self) -> None:
        with self._changed:
            if self.state is not PoolState.STARTING:
                self._changed.wait(WATCH_S)
            state, crew = self.state, self.crew
            is_off = self._settings.is_off
        if is_off:
            self._starter.close()
        elif state is PoolState.STARTING:
            self._start_all()
        elif crew is not None:
            crew.lose_if_dead()
            if self._is_unused():
                self._unless_busy(self._end_unused)
        elif state is PoolState.BROKEN and self._has_worked:
            self.start()  # So on this machine: bring it back for the next run.

    def _is_unused(self) -> bool:
        """Whether the workers live, and nobody used them for as long as the user allows."""
        crew, timeout_s = self.crew, self._settings.idle_timeout_s
        if crew is None or timeout_s is None:
            return False
        return time.monotonic() - crew.used_s >= timeout_s

    def _end_unused(self) -> None:
        if not self._is_unused():  # Somebody was quicker.
            return
        log.info(
            "xDiT: no FLUX image for XDIT_IDLE_TIMEOUT=%g s: %d %s end until the next one.",
            self._settings.idle_timeout_s,
            self.world_size,
            self.device_word,
        )
        self.dismiss()
        if not self._settings.starts_early:
            self._starter.close()

    def _start_all(self) -> None:
        with self._changed:
            devices, settings = self.devices, self._settings
        log.info("xDiT: starting %d %s...", len(devices), device_word(devices))
        self._starter.change(devices, settings)
        try:
            started = self._starter.start()
        except WorkerError as error:
            with self._changed:
                if self._is_wanted(devices, settings):
                    self._fail(str(error), AFTER_START_S)
            return
        with self._changed:
            if not self._is_wanted(devices, settings):
                return dismiss_workers(started.workers)
            self.start_seconds = started.seconds
            timeout_s = self._settings.step_timeout_s
            self.crew = Crew(started, step_timeout_s=timeout_s, lose=self._lose)
            self.num_restarts += self._has_worked
            self._has_worked = True
            self.error = None
            self._set_state(PoolState.READY)
        log.info("xDiT: %d workers joined in %.1f s", self.world_size, self.start_seconds)

    def _is_wanted(self, devices: tuple[Device, ...], settings: Settings) -> bool:
        """Whether what was begun to start was neither stopped nor changed meanwhile."""
        return self.state is PoolState.STARTING and self._is_asked_for(devices, settings)

    # -- either thread ---------------------------------------------------------------------

    def _lose(self, crew: Crew, reason: str) -> None:
        """End all ranks of a crew, once: half a world computes nothing."""
        with self._changed:
            if self.crew is not crew:
                return
            self.crew, crew.lost = None, reason
            self._fail(reason, AFTER_LOSS_S)
        end_workers(crew.workers, grace_s=0)

    def _is_asked_for(self, devices: tuple[Device, ...], settings: Settings) -> bool:
        """Whether workers of these devices and settings are like those of now."""
        asked_for = self.devices, self._settings.of_workers
        return (devices, settings.of_workers) == asked_for

    def _fail(self, reason: str, waits_s: Sequence[float]) -> None:
        self.error = reason
        self._back_off.failed(waits_s)
        self._set_state(PoolState.BROKEN)
        log.error("xDiT: %s", reason)

    def _set_state(self, state: PoolState) -> None:
        self.state = state
        self._changed.notify_all()


class BackOff:
    """Waits that get longer with every failure since the last run that went well.

    A single step that went well would not do to forget them: a model that is too large for a card
    loses a worker in every run, some steps after its start.
    """

    def __init__(self) -> None:
        self._num_failures = 0
        self._end = 0.0

    @property
    def is_over(self) -> bool:
        """Whether workers may be started."""
        return time.monotonic() >= self._end

    def failed(self, waits_s: Sequence[float]) -> None:
        """Begin a wait: one of ``AFTER_LOSS_S`` or ``AFTER_START_S``."""
        self._end = time.monotonic() + waits_s[min(self._num_failures, len(waits_s) - 1)]
        self._num_failures += 1

    def succeeded(self) -> None:
        """A whole run went well."""
        self._num_failures = 0
