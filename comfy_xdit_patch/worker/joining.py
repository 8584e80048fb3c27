"""What a worker does before it can serve: import, join the other ranks, reach them.

Runs in: worker process.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from comfy_xdit_patch.wire.channel import Channel
from comfy_xdit_patch.wire.messages.replies import Joined, Joining
from comfy_xdit_patch.wire.messages.requests import Start

if TYPE_CHECKING:
    import torch

    from comfy_xdit_patch.worker.ranks.groups import Groups

REPLY_DEADLINE_S = 30.0
_WORKERS_OWN = ("cpu", "disable_pinned_memory")
"""Options of ComfyUI's that a worker decides; ``restore_host_state`` says why."""

log = logging.getLogger(__name__)


def join(
    start: Start,
    *,
    rank: int,
    channel: Channel,
    store_fd: int,
    mailbox_fd: int,
    entering: Callable[[str], None],
) -> Groups:
    """Join the other ranks, and tell the host so.

    Args:
        store_fd: a file without a name that all ranks share, by which they meet.
        mailbox_fd: another one, through which CPU ranks exchange tensors.
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
    restore_host_state(start)
    phase_done("comfyui", "import of the engine")
    import comfy_xdit_patch.worker.engine  # noqa: F401 - here, where the collector is off
    from comfy_xdit_patch.hardware.devices import pci_ids
    from comfy_xdit_patch.worker.affinity import stay_near
    from comfy_xdit_patch.worker.ranks import first_exchange
    from comfy_xdit_patch.worker.ranks.groups import Groups

    phase_done("engine", "joining the other ranks")
    device = torch.device("cpu" if start.num_threads is not None else "cuda:0")
    for pci_id in () if device.type == "cpu" else pci_ids().values():
        stay_near(pci_id)
    groups = Groups.join(
        rank=rank,
        world_size=start.world_size,
        device=device,
        store_fd=store_fd,
        mailbox_fd=mailbox_fd,
        join_timeout_s=start.join_timeout_s,
        step_timeout_s=start.step_timeout_s,
        transfer_dtype=start.transfer_dtype,
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


def follow_arguments(arguments: Mapping[str, Any]) -> None:
    """Set ComfyUI's options in a worker as they are in the host now."""
    import comfy.cli_args

    for name, value in arguments.items():
        if name not in _WORKERS_OWN:
            setattr(comfy.cli_args.args, name, value)


def restore_host_state(start: Start) -> None:
    """Import ComfyUI in a worker as the host has it: same tree, same options."""
    sys.path[:] = start.sys_path
    if start.comfyui_root not in sys.path:
        sys.path.insert(0, start.comfyui_root)
    sys.argv[:] = start.argv
    import comfy.options

    if start.parses_arguments:
        comfy.options.enable_args_parsing()
    import comfy.cli_args

    for name, value in start.arguments.items():
        setattr(comfy.cli_args.args, name, value)
    if start.num_threads is not None:
        comfy.cli_args.args.cpu = True
    # A rank's weights lie in a mapped file, which all ranks share. To pin a page of it would make
    # that page the rank's own: as many copies of the model in CPU memory as there are ranks.
    comfy.cli_args.args.disable_pinned_memory = True
    import comfy.model_management
    import comfy.sd
