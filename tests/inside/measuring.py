"""Bodies about the machine as the workers measure it, and what the planner makes of it.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import time
from typing import Any

import forwards
import host_checks
import torch


def measure() -> dict[str, Any]:
    """Have the workers measure, twice; return the status and the seconds of each."""
    host = host_checks._activation().host
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        host.measuring.machine(lambda: None)
        seconds.append(time.perf_counter() - begin)
    return {**host.status(), "measuring_s": seconds}


def _job(patcher: Any, sizes: dict[str, Any]) -> Any:
    from comfy_xdit_patch.planning.cost.job import job_of
    from comfy_xdit_patch.planning.plan import Workload

    flux = patcher.model.diffusion_model
    workload = Workload(
        batch_size=sizes["batch"],
        num_text_tokens=sizes["text_tokens"],
        num_image_tokens=sizes["height"] // 2 * (sizes["width"] // 2),
        num_heads=flux.num_heads,
    )
    num_bytes = sum(weight.nbytes for weight in flux.parameters())
    return job_of(flux, workload, num_bytes=num_bytes, dtype=torch.float32)


def num_weights(path: str) -> dict[str, int]:
    """Weights of a model, counted and as the planner takes them to be."""
    patcher = forwards.patcher_of(path)
    sizes = {"batch": 1, "text_tokens": 64, "height": 32, "width": 32}
    return {
        "counted": sum(w.numel() for w in patcher.model.diffusion_model.parameters()),
        "planned": _job(patcher, sizes).shape.num_weights,
    }
