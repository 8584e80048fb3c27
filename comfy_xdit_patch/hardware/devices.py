"""Which devices the workers get.

Runs in: host, and the doctor's process. The only place that asks torch about GPUs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.settings import AskedDevices
from comfy_xdit_patch.variables import GPUS_LEGAL


@dataclass(frozen=True, slots=True)
class Device:
    """One rank's device.

    ``uuid`` names a GPU independent of how any process numbers them; None for a CPU rank.
    """

    name: str
    uuid: str | None = None
    memory_bytes: int | None = None
    """All of it, whoever uses it. None where this process does not see the GPU, or on a CPU."""

    @property
    def is_cpu(self) -> bool:
        return self.uuid is None

    @property
    def is_mig(self) -> bool:
        """Whether it is a part of a GPU (MIG). torch gives the name, not always the prefix."""
        return " MIG " in self.name or (self.uuid or "").startswith("MIG-")


def choose_devices(asked: AskedDevices) -> tuple[Device, ...] | Refusal:
    """Turn ``XDIT_GPUS`` into devices, one for each rank.

    Returns:
        A refusal when the machine has nothing to offer and the user asked for nothing special.

    UUIDs are taken as they are: a worker may use a GPU that is hidden from this process.

    Raises:
        SettingsError: the user gave indices of GPUs that this process does not see.
    """
    if not sys.platform.startswith("linux"):
        return Refusal(f"xDiT needs Linux; this is {sys.platform}")
    if asked.kind == "cpu":
        return tuple(Device(name="cpu") for _ in range(asked.count))
    if asked.kind == "uuids":
        return tuple(Device(name=uuid, uuid=uuid) for uuid in asked.uuids)
    gpus = visible_gpus()
    if any(gpu.is_mig for gpu in gpus):
        return Refusal("a visible GPU is a MIG slice, and NCCL connects whole GPUs only")
    if asked.kind == "all":
        if len(gpus) < 2:
            return Refusal(
                "one GPU is visible, nothing to share" if gpus else "no usable GPU is visible"
            )
        return gpus
    wanted = tuple(range(asked.count)) if asked.kind == "count" else asked.indices
    missing = [index for index in wanted if index >= len(gpus)]
    if missing:
        shown = ",".join(str(index) for index in wanted)
        raise SettingsError(
            f"XDIT_GPUS asks for GPU {shown}, but ComfyUI's process sees {len(gpus)} GPUs. "
            f"Legal: {GPUS_LEGAL}."
        )
    return tuple(gpus[index] for index in wanted)


def visible_gpus() -> tuple[Device, ...]:
    """NVIDIA GPUs in the order in which this process numbers them."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Device(gpu.name, _cuda_uuid(gpu.uuid), gpu.total_memory) for gpu in found)


def pci_ids() -> dict[str, str]:
    """PCI ids, as the kernel names them, by UUID; of the GPUs whose torch says so."""
    import torch

    found = {}
    for i, gpu in enumerate(visible_gpus()):
        known: Any = torch.cuda.get_device_properties(i)
        if gpu.uuid is not None and hasattr(known, "pci_domain_id"):  # not in older torch
            domain, bus, slot = known.pci_domain_id, known.pci_bus_id, known.pci_device_id
            found[gpu.uuid] = f"{domain:04x}:{bus:02x}:{slot:02x}.0"
    return found


def peer_access() -> dict[tuple[str, str], bool]:
    """Whether the driver lets one GPU read and write another one's memory, by their UUIDs."""
    import torch

    uuids = [gpu.uuid or "" for gpu in visible_gpus()]
    found = {}
    for a, b in permutations(range(len(uuids)), 2):
        try:
            found[uuids[a], uuids[b]] = bool(torch.cuda.can_device_access_peer(a, b))
        except RuntimeError:  # A driver that does not answer leaves it unknown.
            continue
    return found


def _cuda_uuid(uuid: object) -> str:
    text = str(uuid)
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"
