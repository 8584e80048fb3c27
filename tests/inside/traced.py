"""A body that notes which functions of the package the host enters in one step.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import sys
from typing import Any

import comfy.model_management
import rig_shim_trace
import torch
from forwards import inputs, patcher_of


def step(path: str, number: int, **sizes: Any) -> list[tuple[str, str]]:
    """Return file and function of everything that step ``number`` of a run enters, in order."""
    host = sys.modules["comfy_xdit_patch.host.guest.activation"].ACTIVATION.host
    patcher = patcher_of(path)
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    arguments = inputs(patcher.model, **sizes)
    run = host.begin_run()
    token = host.current_run.set(run)
    try:
        with torch.inference_mode():
            for index in range(number + 1):
                arguments = {name: value.clone() for name, value in arguments.items()}
                arguments["x"] += 0.01
                rig_shim_trace.entered.clear()
                sys.setprofile(rig_shim_trace.note if index == number - 1 else None)
                patcher.model.apply_model(**arguments, transformer_options={})
                sys.setprofile(None)
                if index == number - 1:
                    found = list(rig_shim_trace.entered)
    finally:
        host.current_run.reset(token)
        host.end_run(run)
    return found
