"""What a verdict of ``auto`` is about: the machine with its versions, the model, the size of call.

Runs in: host process. A difference in any of it is another case, which is measured anew.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_xdit_patch import __version__
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.hardware.survey import driver_version
from comfy_xdit_patch.planning.transfers import TransferDtype


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of call on one machine."""

    machine: str
    model: str
    size: str

    @property
    def key(self) -> str:
        return " | ".join((self.machine, self.model, self.size))


def machine_text(
    devices: Sequence[Device],
    *,
    torch_version: str,
    num_threads: int,
    comfyui: Path | None,
    transfer_dtype: TransferDtype = "exact",
) -> str:
    """Name everything about ranks and programs that a step's time may depend on.

    Args:
        devices: of all ranks; on the first, or beside it on the CPU, ComfyUI computes alone.
        num_threads: that ComfyUI computes with on a CPU.
        comfyui: its folder.
        transfer_dtype: in which form heads travel between the ranks.
    """
    parts = [] if transfer_dtype == "exact" else [f"transfers in {transfer_dtype}"]
    if devices[0].is_cpu:
        # What the kernel lets this process and its workers use.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        parts.append(f"{len(devices)} x cpu, cores {cores}, {num_threads} threads in ComfyUI")
    else:
        parts += [f"{device.name} ({device.uuid})" for device in devices]
        parts.append(f"driver {driver_version() or 'unknown'}")
    version = comfyui_version(comfyui) if comfyui else None
    parts += [f"ComfyUI {version}"] if version else []
    return ", ".join([*parts, f"torch {torch_version}, comfy-xdit-patch {__version__}"])


def comfyui_version(tree: Path) -> str | None:
    """Read the version that a ComfyUI states, without importing anything; None if it states none.

    Args:
        tree: its folder.
    """
    try:
        body = ast.parse((tree / "comfyui_version.py").read_text()).body
    except (OSError, SyntaxError):
        return None
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return str(ast.literal_eval(node.value))
    return None
