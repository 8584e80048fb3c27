"""Bodies that call a ControlNet and then the model, as ComfyUI's samplers do in one step.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import sys
from typing import Any

import comfy.controlnet
import comfy.model_management
import forwards
import torch

STRENGTH = 0.7
_controls: dict[str, Any] = {}


def forward(path: str, control_path: str, out: str, **sizes: Any) -> dict[str, Any]:
    """Run one step with a union ControlNet's residuals, and save the model's output."""
    if control_path not in _controls:
        _controls[control_path] = comfy.controlnet.load_controlnet(control_path)
    control = _controls[control_path]
    patcher = forwards.patcher_of(path)
    comfy.model_management.load_models_gpu([patcher, control.control_model_wrapped])
    patcher.pre_run()
    arguments = forwards.inputs(patcher.model, **sizes)
    activation = sys.modules.get("comfy_xdit_patch.host.guest.activation")
    host = None if activation is None else activation.ACTIVATION.host
    run = token = None
    if host is not None:
        run = host.begin_run(patcher)
        token = host.current_run.set(run)
    try:
        with torch.inference_mode():
            residuals = control.control_model(
                x=arguments["x"],
                hint=arguments["x"].flip(-1),
                timesteps=arguments["t"],
                context=arguments["c_crossattn"],
                y=arguments["y"],
                guidance=arguments["guidance"],
                control_type=[2],
            )
            arguments["control"] = {
                name: [residual * STRENGTH for residual in of_name]
                for name, of_name in residuals.items()
            }
            result = patcher.model.apply_model(**arguments, transformer_options={})
    finally:
        if host is not None:
            host.current_run.reset(token)
            host.end_run(run)
    torch.save(result, out)
    return forwards.status()
