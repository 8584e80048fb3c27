"""What about this machine's GPUs keeps several processes from sharing them.

Runs in: the doctor's process, and a child of the check's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from comfy_xdit_patch.planning.interconnect import Interconnect
from comfy_xdit_patch.planning.survey import compute_modes
from comfy_xdit_patch.planning.topology import Device

SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_BYTES = 1 << 30
"""What NVIDIA's guide to NCCL in containers asks for (``--shm-size=1g``)."""
ONE_PROCESS = ("Exclusive_Process", "Exclusive_Thread", "Prohibited")


def gpu_faults(devices: Sequence[Device], found: Interconnect) -> list[str]:
    """Say all that is wrong, asking the system."""
    small = shared_memory_fault(found)
    return [*mode_faults(devices, compute_modes()), *([] if small is None else [small])]


def mode_faults(devices: Sequence[Device], modes: Mapping[str, str]) -> list[str]:
    """Name the GPUs on which the driver lets no second process compute.

    Args:
        modes: compute mode by UUID, as ``nvidia-smi`` has it.
    """
    return [
        f"rank {rank}: compute mode {modes[device.uuid]} lets one process at most use the GPU, and "
        f"ComfyUI and a worker share it. Run `sudo nvidia-smi -i {device.uuid} -c DEFAULT`."
        for rank, device in enumerate(devices)
        if device.uuid is not None and modes.get(device.uuid) in ONE_PROCESS
    ]


def shared_memory_fault(found: Interconnect) -> str | None:
    """Say that /dev/shm is small where data between GPUs passes it: no peer-to-peer."""
    if not any(is_peer is False for row in found.peers for is_peer in row):
        return None
    system = os.statvfs(SHARED_MEMORY)
    num_bytes = system.f_frsize * system.f_blocks
    if num_bytes >= SHARED_MEMORY_BYTES:
        return None
    return (
        f"{SHARED_MEMORY} has {num_bytes >> 20} MiB, and data between GPUs without peer-to-peer "
        "passes it. Give the container more, such as `docker run --shm-size=1g`."
    )
