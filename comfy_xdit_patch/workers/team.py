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
from functools import partial
from pathlib import Path

from comfy_xdit_patch.errors import ExchangeError, WorkerError, XditError
from comfy_xdit_patch.planning.topology import Device
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.workers.environment import HostState, is_peer_to_peer_off, worker_variables
from comfy_xdit_patch.workers.nursing import Nursery
from comfy_xdit_patch.workers.starting import Team, start_message, start_workers

log = logging.getLogger(__name__)


def start_nursery(
    device: Device, *, host_state: HostState, settings: Settings, log_dir: Path
) -> Nursery:
    """Start the process that ranks are forked from; it ends with the thread that calls this."""
    return Nursery(
        log_path=log_dir / "nursery.log",
        environment=worker_variables(device, cpu_threads=1),
        warm_up=start_message(host_state, settings, device, 1),
    )


def start_team(
    devices: Sequence[Device],
    *,
    host_state: HostState,
    settings: Settings,
    log_dir: Path,
    nursery: Nursery,
    no_peer_to_peer: str | None,
) -> Team:
    """Start all ranks, twice at most, under one deadline.

    Args:
        no_peer_to_peer: why these devices do without, if an earlier start found that they must.

    Raises:
        WorkerError: they did not start; none is left running. The text has every cause.
    """
    begin = time.monotonic()
    start = partial(
        start_workers,
        devices,
        host_state=host_state,
        settings=settings,
        log_dir=log_dir,
        nursery=nursery,
        end=begin + settings.start_timeout_s,
    )
    reason = no_peer_to_peer
    try:
        if reason is None:
            try:
                return start(peer_to_peer=True, is_last=is_peer_to_peer_off())
            except ExchangeError as error:
                if is_peer_to_peer_off():
                    raise
                reason = str(error)
                log.warning(
                    "xDiT: the workers cannot exchange data and are started again without "
                    "peer-to-peer (NCCL_P2P_DISABLE=1). %s",
                    error,
                )
        team = start(peer_to_peer=False, is_last=True)
    except (XditError, OSError) as error:
        if reason is None:
            raise WorkerError(f"The workers did not start. {error}") from None
        raise WorkerError(
            f"The workers did not start. {error}\n"
            f"That was without peer-to-peer, because of this before: {reason}"
        ) from None
    return replace(team, seconds=time.monotonic() - begin, no_peer_to_peer=reason)
