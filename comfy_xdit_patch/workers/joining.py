"""What a worker does before it can serve: import, join the other ranks, reach them.

Runs in: worker process.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from comfy_xdit_patch.transport.channel import Channel
from comfy_xdit_patch.transport.messages import Start
from comfy_xdit_patch.transport.replies import Joined, Joining

if TYPE_CHECKING:
    import torch

    from comfy_xdit_patch.engine.groups import Groups

REPLY_DEADLINE_S = 30.0

log = logging.getLogger(__name__)


def join(
    start: Start, *, rank: int, channel: Channel, store_fd: int, entering: Callable[[str], None]
) -> Groups:
    """Join the other ranks, and tell the host so.

    Args:
        store_fd: a file without a name that all ranks share.
        entering: called with the name of each phase as it begins.
    """
    # Nothing that an import makes is garbage: without this the collector takes a third of the
    # start (11.4 s of CPU time become 7.9 s; ComfyUI 0.33.0, torch 2.11).
    gc.disable()
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def phase_done(name: str, next_phase: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 3)
        clock = time.perf_counter()
        entering(next_phase)

    entering("import of torch")
    import torch

    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    phase_done("torch", "import of ComfyUI")
    from comfy_xdit_patch.workers.environment import restore_host_state

    restore_host_state(start)
    phase_done("comfyui", "import of the engine")
    import comfy_xdit_patch.engine.engine  # noqa: F401 - here, where the collector is off
    from comfy_xdit_patch.engine import first_exchange
    from comfy_xdit_patch.engine.groups import Groups
    from comfy_xdit_patch.planning.topology import pci_ids
    from comfy_xdit_patch.workers.affinity import stay_near

    phase_done("engine", "joining the other ranks")
    device = torch.device("cpu" if start.num_threads is not None else "cuda:0")
    for pci_id in () if device.type == "cpu" else pci_ids().values():
        stay_near(pci_id)
    groups = Groups.join(
        rank=rank,
        world_size=start.world_size,
        device=device,
        store_fd=store_fd,
        join_timeout_s=start.join_timeout_s,
        step_timeout_s=start.step_timeout_s,
    )
    phase_done("join", "the first exchange between ranks")
    channel.send(Joining(rank), deadline_s=REPLY_DEADLINE_S)
    before, _ = _memory(device)
    first_exchange.check(groups)
    phase_done("exchange", "waiting for work")
    free, total = _memory(device)
    of_groups = max(0, before - free)
    joined = Joined(rank, os.getpid(), str(device), seconds, total, free, of_groups)
    channel.send(joined, deadline_s=REPLY_DEADLINE_S)
    log.info("joined %d ranks: %s", start.world_size, seconds)
    gc.freeze()
    gc.enable()
    return groups


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a GPU."""
    import torch

    return (0, 0) if device.type == "cpu" else torch.cuda.mem_get_info(device)
