"""Published times of FLUX on one and several GPUs, and what the cost model says of each.

Runs in: pytest and ``planning_tables.py``; no ComfyUI.

Rows are data: who, on what, with which plan, how long. ``outside_s`` is what a published time of a
whole image has beside its steps (text encoder, VAE, start), fitted for each source; 0 where the
source gives the time of a step.

``use``: "fit" if a constant of the model was set by the row, "test" if none was. ``remark`` says
why a row is not met.

Not here: times whose part outside of the steps, number of steps or GPU is not published (xDiT's
FLUX.1-schnell and H20 tables, TACO-DiT), other models (Qwen-Image, Mochi), several machines, and
methods that this package has not (asynchronous or fp8 exchange, caches of steps).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from comfy_xdit_patch.planning.cost.candidate import parse_asked
from comfy_xdit_patch.planning.cost.cost import predict
from comfy_xdit_patch.planning.cost.known_machines import machine_of
from comfy_xdit_patch.planning.cost.known_models import MODELS
from comfy_xdit_patch.planning.cost.model_shape import (
    COMPILED,
    EAGER,
    PRECISIONS,
    Job,
    workload_for,
)
from comfy_xdit_patch.planning.transfers import TransferDtype

XDIT = "xDiT flux.md"
CACHE_DIT = "cache-dit"
PARA = "ParaAttention"
SGLANG = "SGLang"
FLUMINA = "flumina"
DIFFUSERS = "diffusers"

EXECUTIONS = {execution.name: execution for execution in (EAGER, COMPILED)}

LAUNCHES = "diffusers' launches and kernels, not ComfyUI's, set the pace"
TENSOR_AT_SGLANG = "SGLang's tensor parallelism of that commit gains 1.2x, ours was not timed"


def make_job(
    model: str = "flux1-dev",
    *,
    px: int = 1024,
    text: int | None = None,
    precision: str = "bf16",
    execution: str = "eager",
    rows: int = 1,
    steps: int = 28,
    overlaps: bool = True,
    transfer_dtype: TransferDtype = "exact",
    captures: bool = False,
) -> Job:
    """Make a job from names."""
    shape = MODELS[model]
    workload = workload_for(shape, width_px=px, height_px=px, num_rows=rows, num_text_tokens=text)
    how = EXECUTIONS[execution], overlaps, transfer_dtype, captures
    return Job(shape, workload, PRECISIONS[precision], steps, *how)


@dataclass(frozen=True)
class Row:
    """One published time."""

    source: str
    gpus: str
    plan: str
    seconds: float
    use: Literal["fit", "test"]
    execution: str = "compiled"
    steps: int = 1
    outside_s: float = 0.0
    model: str = "flux1-dev"
    precision: str = "bf16"
    px: int = 1024
    text: int = 512
    remark: str = ""

    @property
    def predicted_s(self) -> float:
        job = make_job(
            self.model,
            px=self.px,
            text=self.text,
            precision=self.precision,
            execution=self.execution,
            overlaps=False,  # Their ranks compute nothing meanwhile.
        )
        plan = parse_asked(self.plan).plan
        assert plan is not None
        return self.outside_s + self.steps * predict(plan, job, machine_of(self.gpus)).total_s

    @property
    def error(self) -> float:
        """0.1 is a prediction 10 % too long."""
        return self.predicted_s / self.seconds - 1


def _images(source, execution, outside_s, steps, *rows, remark=""):
    """Rows of one source with the same settings: gpus, plan, seconds, use."""
    return [
        Row(
            source,
            *row[:4],
            execution=execution,
            steps=steps,
            outside_s=outside_s,
            remark=row[4] if len(row) > 4 else remark,
        )
        for row in rows
    ]


ROWS = [
    *_images(
        *(XDIT, "compiled", 0.5, 28),
        ("1xh100", "single", 4.30, "fit"),
        ("2xh100", "ulysses=2", 2.68, "test"),
        ("2xh100", "ring=2", 2.60, "test"),
        ("4xh100", "ulysses=4", 1.63, "fit"),
        ("4xh100", "ulysses=2,ring=2", 1.80, "test"),
        ("4xh100", "ring=4", 1.98, "fit"),
    ),
    *_images(
        *(CACHE_DIT, "eager", 0.0, 28),
        ("1xl20", "single", 23.56, "fit"),
        ("2xl20", "ulysses=2", 13.80, "fit"),
        ("2xl20", "ring=2", 13.43, "test"),
        ("2xl20", "tensor=2", 14.61, "test"),
        ("4xl20", "ulysses=4", 8.28, "fit"),
        ("4xl20", "ring=4", 9.16, "test"),
        ("4xl20", "ulysses=2,ring=2", 8.55, "test"),
        ("4xl20", "tensor=4", 10.69, "test"),
    ),
    *_images(
        *(CACHE_DIT, "compiled", 0.0, 28),
        ("2xl20", "ulysses=2", 12.21, "fit"),
        ("4xl20", "ulysses=4", 7.27, "test"),
        ("4xl20", "tensor=4", 9.84, "test"),
    ),
    *_images(
        *(PARA, "compiled", 0.1, 28),
        ("1xa100", "single", 9.997, "fit"),
        ("2xa100", "ring=2", 5.775, "test"),
        (
            *("4xa100", "ulysses=2,ring=2", 3.557, "test"),
            "the A100's link rate is assumed; no published row gives it",
        ),
    ),
    Row(SGLANG, "1xh100", "single", 0.128, "test"),
    Row(SGLANG, "1xh100", "single", 0.154, "fit", execution="eager"),
    Row(SGLANG, "1xh100", "single", 0.460, "test", model="flux2-dev"),
    Row(
        *(SGLANG, "2xh100", "tensor=2", 0.369, "test"),
        model="flux2-dev",
        remark=TENSOR_AT_SGLANG,
    ),
    Row(SGLANG, "2xh100", "tensor=2", 0.0985, "test", px=720, remark=TENSOR_AT_SGLANG),
    Row(FLUMINA, "1xh100", "single", 1 / 11.5, "fit", precision="fp8-compute"),
    Row(FLUMINA, "1x4090", "single", 1 / 3.51, "fit", precision="fp8-compute"),
    Row(FLUMINA, "1x4090", "single", 1 / 2.55, "fit", "eager", precision="fp8-compute"),
    Row("ComfyUI", "1x4090", "single", 1 / 1.85, "fit", "eager", precision="fp8", text=256),
    Row("raylight", "1x5090", "single", 0.29, "fit", "eager", precision="fp8-compute", text=256),
    Row("raylight", "1xrtx2000ada", "single", 2.22, "fit", "eager", precision="fp8", text=256),
    Row("raylight", "2xrtx2000ada", "ulysses=2", 1.26, "test", "eager", precision="fp8", text=256),
    Row(PARA, "1xa100", "single", 13.843, "test", "eager", 28, 0.1, remark=LAUNCHES),
    *_images(
        *(XDIT, "eager", 0.5, 28),
        ("1xh100", "single", 6.71, "test"),
        ("2xh100", "ulysses=2", 4.38, "test"),
        ("2xh100", "ring=2", 5.31, "test"),
        ("4xh100", "ulysses=2,ring=2", 5.19, "test"),
        ("4xh100", "ulysses=4", 4.24, "test"),
        ("4xh100", "ring=4", 5.11, "test"),
        remark=LAUNCHES,
    ),
    *_images(
        *("xDiT #416", "eager", 0.5, 25),
        ("8xh100", "ulysses=4,ring=2", 2.81, "test"),
        ("8xh100", "ulysses=2,ring=4", 3.55, "test"),
        ("8xh100", "ring=8", 4.34, "test"),
        remark=LAUNCHES,
    ),
    *_images(
        *(DIFFUSERS, "eager", 0.0, 50),
        ("4xh100", "ulysses=4", 6.671, "test"),
        ("4xh100", "ulysses=2,ring=2", 11.069, "test"),
        ("4xh100", "ring=4", 13.076, "test"),
        remark=LAUNCHES,
    ),
]


def median_error(rows: list[Row]) -> float:
    """The median of the errors' sizes."""
    return statistics.median(abs(row.error) for row in rows)
