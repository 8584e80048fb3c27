"""Which devices the workers get.

Runs in: host, and the doctor's process. The only place that asks torch about GPUs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.settings import GPUS_LEGAL, DeviceRequest


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


def choose_devices(request: DeviceRequest) -> tuple[Device, ...] | Refusal:
    """Turn ``XDIT_GPUS`` into devices, one for each rank.

    Returns:
        A refusal when the machine has nothing to offer and the user asked for nothing special.

    UUIDs are taken as they are: a worker may use a GPU that is hidden from this process.

    Raises:
        SettingsError: the user gave indices of GPUs that this process does not see.
    """
    if not sys.platform.startswith("linux"):
        return Refusal(f"xDiT needs Linux; this is {sys.platform}")
    if request.kind == "cpu":
        return tuple(Device(name="cpu") for _ in range(request.count))
    if request.kind == "uuids":
        return tuple(Device(name=uuid, uuid=uuid) for uuid in request.uuids)
    gpus = visible_gpus()
    if request.kind == "all":
        if len(gpus) < 2:
            return Refusal(
                "one GPU is visible, nothing to share" if gpus else "no usable GPU is visible"
            )
        return gpus
    wanted = tuple(range(request.count)) if request.kind == "count" else request.indices
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


def _cuda_uuid(uuid: object) -> str:
    text = str(uuid)
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"
