"""Keep a rank on the cores beside its GPU.

Runs in: worker process.

A rank's own thread launches every kernel. On a machine with two sockets the kernel would move it
between them, and each launch from the far one passes the link between the sockets.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")


def stay_near(pci_id: str) -> set[int]:
    """Keep this thread, and those that it starts, on the cores of a PCI device's NUMA node.

    Args:
        pci_id: as the kernel names it, such as ``0000:c1:00.0``.

    Returns:
        The cores. None where the kernel knows none that this process may use: nothing changes.
    """
    near: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        near = cores_of((PCI_DEVICES / pci_id / "local_cpulist").read_text())
        near &= os.sched_getaffinity(0)
        if near:
            os.sched_setaffinity(0, near)
    return near


def cores_of(cpulist: str) -> set[int]:
    """Read a list of cores as the kernel writes it, such as ``0-15,64-79``.

    Raises:
        ValueError: the text is no such list.
    """
    cores: set[int] = set()
    for part in filter(None, cpulist.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
