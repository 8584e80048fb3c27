"""What the settings make of this machine: its devices, or why there are none.

Runs in: host, and the doctor's process.
"""

from __future__ import annotations

import os

from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.hardware.devices import Device, choose_devices, visible_gpus
from comfy_xdit_patch.hardware.survey import known_uuids
from comfy_xdit_patch.planning.planner import check_strategy
from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.system_memory import available_bytes
from comfy_xdit_patch.variables import GPUS_LEGAL

MIN_CPU_RANKS = 8
"""So many CPU ranks may be tried on any machine: most machines with GPUs have as many GPUs."""
CPU_RANK_BYTES = 250 << 20
"""What an idle CPU rank takes beside what all share (measured with 8, ComfyUI 0.33.0)."""


def devices_of(settings: Settings) -> tuple[Device, ...] | Refusal:
    """The devices of all ranks; a refusal where there is nothing to do.

    Raises:
        SettingsError: the settings ask for what this machine does not have.
    """
    if settings.is_off:
        return Refusal("switched off by the settings")
    if settings.gpus.kind == "cpu":
        _check_cpu_ranks(settings.gpus.count)
    devices = choose_devices(settings.gpus)
    if isinstance(devices, Refusal):
        return devices
    if settings.gpus.kind == "uuids":
        _check_uuids(settings.gpus.uuids)
    check_strategy(settings.strategy, world_size=len(devices))
    return devices


def _check_cpu_ranks(count: int) -> None:
    num_cores, free = len(os.sched_getaffinity(0)), available_bytes()
    most = min(max(MIN_CPU_RANKS, num_cores), max(1, free // CPU_RANK_BYTES))
    if count > most:
        raise SettingsError(
            f"XDIT_GPUS=cpu:{count} is more than this machine takes, which is {most}: it has "
            f"{num_cores} cores and {free / 2**30:.1f} GiB of free memory. Legal: {GPUS_LEGAL}."
        )


def _check_uuids(wanted: tuple[str, ...]) -> None:
    """See that GPUs of these UUIDs exist; as CUDA does, take the beginning of one for it.

    A GPU that is hidden from this process is there all the same, so the driver is asked. Where it
    says nothing, the UUIDs are taken as they are.
    """
    there = {*known_uuids(), *(gpu.uuid or "" for gpu in visible_gpus())}
    missing = [
        uuid for uuid in wanted if sum(one.lower().startswith(uuid.lower()) for one in there) != 1
    ]
    if there and missing:
        raise SettingsError(
            f"XDIT_GPUS names {', '.join(missing)}, which is not one GPU of this machine. It has "
            f"{', '.join(sorted(there))}. Legal: {GPUS_LEGAL}."
        )
