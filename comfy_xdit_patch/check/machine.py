"""Which GPUs, links and versions there are, asked in a process that ends.

Runs in: the check's process, and a child of it. A process that has asked torch for GPUs keeps
memory on them until it ends; the check measures the memory of others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from comfy_xdit_patch.errors import CheckError
from comfy_xdit_patch.hardware.devices import visible_gpus
from comfy_xdit_patch.hardware.survey import survey
from comfy_xdit_patch.report.doctor_sections import gpu_faults, place_lines

ASK_DEADLINE_S = 120.0
MARK = "xdit-check-machine "
"""Begins the line that the check reads; libraries print lines of their own."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, in the order of ranks."""

    name: str
    uuid: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found.

    Attributes:
        links: lines about where GPUs are and what lies between them, as the doctor has them; what
            is wrong with that begins with ``!``.
    """

    gpus: tuple[Gpu, ...]
    links: tuple[str, ...]
    torch: str
    cuda: str | None
    nccl: str | None


def find_machine() -> Machine:
    """Ask a child process.

    Raises:
        CheckError: it failed, or sees no GPU.
    """
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CheckError(
            f"torch did not say within {ASK_DEADLINE_S:g} s which GPUs there are."
        ) from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise CheckError(f"torch did not say which GPUs there are: {last}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    gpus = tuple(Gpu(**gpu) for gpu in found.pop("gpus"))
    if not gpus:
        raise CheckError(
            "No usable GPU is visible to this Python. Run the check with the Python that runs "
            "ComfyUI."
        )
    return Machine(gpus=gpus, links=tuple(found.pop("links")), **found)


def _machine() -> Machine:
    import torch

    devices = visible_gpus()
    gpus = tuple(Gpu(gpu.name, gpu.uuid or "", gpu.memory_bytes or 0) for gpu in devices)
    lines: list[str] = []
    if devices:
        found = survey(devices)
        faults = gpu_faults(devices, found)
        lines = [*place_lines(found), *(f"! {fault}" for fault in faults)]
    return Machine(gpus, tuple(lines), torch.__version__, torch.version.cuda, _nccl())


def _nccl() -> str | None:
    import torch

    try:
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (AttributeError, RuntimeError):  # This torch is built without it.
        return None


if __name__ == "__main__":
    sys.stdout.write(MARK + json.dumps(asdict(_machine())) + "\n")
