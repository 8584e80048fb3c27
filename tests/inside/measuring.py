"""Bodies about the machine as the workers measure it, and what the planner makes of it.

Runs in: a ComfyUI process of ``process.py``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import comfy.model_management
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


def predicted_and_measured(path: str, calls: int, **sizes: Any) -> dict[str, Any]:
    """Seconds of a call, as the measured machine has it and as it is, by plan."""
    from comfy_xdit_patch.planning.choice import Choice, choose

    host = host_checks._activation().host
    patcher = forwards.patcher_of(path)
    machine = host.measuring.machine(lambda: None)
    choice = choose(_job(patcher, sizes), machine, world_size=len(machine.gpus))
    assert isinstance(choice, Choice)
    predicted = {option.plan.name: option.time.total_s for option in choice.options}
    parallel = [each["host"] for each in forwards.run_of_calls(path, calls, **sizes)]
    alone = []
    comfy.model_management.load_models_gpu([patcher])
    arguments = forwards.inputs(patcher.model, **sizes)
    options = {"multigpu_thread_device": "cpu"}  # with which calls are left to ComfyUI
    with torch.inference_mode():
        for _ in range(calls):
            begin = time.perf_counter()
            patcher.model.apply_model(**arguments, transformer_options=dict(options))
            alone.append(time.perf_counter() - begin)
    plan = host.totals.last_run.plan
    return {
        "plan": plan,
        "predicted": predicted,
        "chosen": choice.chosen.plan.name,
        "measured": {plan: statistics.median(parallel[1:]), "single": statistics.median(alone[1:])},
    }


def _job(patcher: Any, sizes: dict[str, Any]) -> Any:
    from comfy_xdit_patch.planning.job import Job
    from comfy_xdit_patch.planning.model_shape import ModelShape, Precision
    from comfy_xdit_patch.planning.plan import Workload

    flux = patcher.model.diffusion_model
    params = flux.params
    shape = ModelShape(
        name="tiny",
        width=params.hidden_size,
        num_double_blocks=params.depth,
        num_single_blocks=params.depth_single_blocks,
        mlp_ratio=int(params.mlp_ratio),
        is_gated=False,
        has_bias=True,
        modulation="blocks",
        in_width=flux.in_channels,
        out_width=flux.out_channels,
        text_width=params.context_in_dim,
        embedded=(256, 256, params.vec_in_dim),
        num_text_tokens=sizes["text_tokens"],
        num_steps=20,
    )
    workload = Workload(
        batch_size=sizes["batch"],
        num_text_tokens=sizes["text_tokens"],
        num_image_tokens=sizes["height"] // 2 * (sizes["width"] // 2),
        num_heads=flux.num_heads,
    )
    stored = flux.double_blocks[0].img_attn.qkv.weight.element_size()
    return Job(shape, workload, Precision("as loaded", stored, bytes_per_value=4), 20)
