"""Start the workers; where they cannot exchange data, once more without peer-to-peer.

Runs in: host process, in the keeper's thread.

NCCL over peer-to-peer hangs or fails on some boards, and on some it brings other data: the IOMMU,
or the access control of PCIe switches (ACS), redirects what one GPU writes into another one's
memory. Nothing tells but the first exchange itself. Through CPU memory it works on all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from comfy_xdit_patch.errors import ExchangeError, WorkerError, XditError
from comfy_xdit_patch.planning.topology import Device
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.workers.environment import HostState, is_peer_to_peer_off, worker_variables
from comfy_xdit_patch.workers.log_files import LogDirectory
from comfy_xdit_patch.workers.nursing import Nursery
from comfy_xdit_patch.workers.starting import Team, start_message, start_workers

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

    def start(self) -> Team:
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
            team = self._start(end, peer_to_peer=False, is_last=True)
        except (XditError, OSError) as error:
            if reason is None:
                raise WorkerError(f"The workers did not start. {error}") from None
            raise WorkerError(
                f"The workers did not start. {error}\n"
                f"That was without peer-to-peer, because of this before: {reason}"
            ) from None
        self.no_peer_to_peer = reason
        return replace(team, seconds=time.monotonic() - begin)

    def change(self, devices: Sequence[Device], settings: Settings) -> None:
        """What is started next is other devices, of the same kind, or under other settings."""
        self._devices, self._settings = devices, settings
        self.no_peer_to_peer = None

    def close(self) -> None:
        """End the nursery, and with it all ranks that are left."""
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def _start(self, end: float, *, peer_to_peer: bool, is_last: bool) -> Team:
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
