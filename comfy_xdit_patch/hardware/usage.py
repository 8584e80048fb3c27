"""What is used of each rank's device: memory, and part of its time.

Runs in: host process.

    GPU     NVML (package ``nvidia-ml-py``), which counts every program's use; without it only what
            the card has is known: torch would open each card to ask it for more
    CPU     the rank's own process, in /proc, and what the machine has

Asking is cheap, and nothing is asked twice within a second.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.system_memory import available_bytes

PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one device; None for what is unknown. ``utilisation`` is 0 to 1."""

    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    utilisation: float | None = None


class Gauge:
    """Asks for the use of all ranks' devices, from time to time."""

    def __init__(self) -> None:
        self._asked: Sequence[tuple[Device, int | None]] = ()
        self._then_s = 0.0
        self._found: list[Usage] = []
        self._ticks: dict[int, float] = {}

    def read(self, ranks: Sequence[tuple[Device, int | None]], *, cpu_threads: int) -> list[Usage]:
        """Return the use of each rank's device; at most a second old.

        Args:
            ranks: each one's device, and the number of its process; None if it has none.
            cpu_threads: that a CPU rank computes with: using all of them is 1.
        """
        now_s = time.monotonic()
        if ranks != self._asked or now_s - self._then_s >= PERIOD_S:
            seconds, ticks = now_s - self._then_s, self._ticks
            self._ticks = {
                pid: process_ticks(pid) for device, pid in ranks if pid and device.is_cpu
            }
            self._found = []
            nvml = None if all(device.is_cpu for device, _ in ranks) else open_nvml()
            for device, pid in ranks:
                if not device.is_cpu:
                    self._found.append(_of_gpu(device, nvml))
                    continue
                part = None
                if pid in ticks and self._ticks[pid] >= ticks[pid]:
                    worked = (self._ticks[pid] - ticks[pid]) / os.sysconf("SC_CLK_TCK")
                    part = min(1.0, worked / seconds / cpu_threads)
                self._found.append(_of_cpu(pid, part))
            self._asked, self._then_s = list(ranks), now_s
        return self._found


def _of_cpu(pid: int | None, utilisation: float | None) -> Usage:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    used = None if pid is None else resident_bytes(pid)
    return Usage(total, used, available_bytes(), utilisation)


def _of_gpu(device: Device, nvml: Any | None) -> Usage:
    if nvml is None:
        return Usage(device.memory_bytes)
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(device.uuid)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        part = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except nvml.NVMLError:
        return Usage(device.memory_bytes)
    return Usage(int(memory.total), int(memory.used), int(memory.free), part)


def open_nvml() -> Any | None:
    """NVIDIA's management library, ready to be asked; None where it is not."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def resident_bytes(pid: int) -> int | None:
    """What a process has in memory, with what it shares; None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def process_ticks(pid: int) -> float:
    """Clock ticks that a process, with all its threads, has worked since it started; 0: it ended.

    The kernel counts ``SC_CLK_TCK`` of them a second.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return float(int(fields[11]) + int(fields[12]))
