"""Rows of ``bench.json``: a figure, its baseline of the same run, their ratio, and how exact it is.

Runs in: the rig's environment.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comfy_xdit_patch import __version__
from comfy_xdit_patch.check.machine import find_machine
from comfy_xdit_patch.hardware.survey import driver_version
from comfy_xdit_patch.system_memory import available_bytes

DIGITS = 4


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: what was measured, then ``against`` what.
        value: median over all rounds; None where there is none, and ``parity`` says why.
        unit: of value and baseline.
        baseline: median of the baseline, which took turns with the value in every round.
        ratio: value over baseline, median of the rounds. Of times, below 1 is faster.
        spread: lower and upper quartile of the ratio over the rounds.
        parity: how far results are from the baseline's or from whole attention, or what was raised.
    """

    name: str
    value: float | None
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    parity: str | None = None


def compared(
    name: str,
    unit: str,
    values: Sequence[float],
    baselines: Sequence[float],
    parity: str | None = None,
) -> Row:
    """Make a row of as many rounds as there are values; each has the baseline of its round."""
    ratios = [value / baseline for value, baseline in zip(values, baselines, strict=True)]
    lower, _, upper = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return Row(
        name,
        rounded(statistics.median(values)),
        unit,
        rounded(statistics.median(baselines)),
        rounded(statistics.median(ratios)),
        (rounded(lower), rounded(upper)),
        parity,
    )


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def text_of(rows: Sequence[Row]) -> str:
    """Return rows as a table in Markdown."""
    lines = [
        "| name | value | baseline | ratio | quartiles | parity |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            _with_unit(row.value, row.unit),
            _with_unit(row.baseline, row.unit),
            "" if row.ratio is None else f"{row.ratio:.3g}",
            "" if row.spread is None else "{:.3g} to {:.3g}".format(*row.spread),
            row.parity or "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:g} {unit}".strip()


def write(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write rows, and what they were measured with."""
    body = {**about, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(body, indent=1) + "\n")


def about(comfyui: str, *, is_quick: bool) -> dict[str, Any]:
    """Name the hardware and the versions that rows hold for."""
    machine = find_machine() if torch.cuda.device_count() else None
    return {
        "date": datetime.date.today().isoformat(),
        "is_quick": is_quick,
        "hardware": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_available_gib": round(available_bytes() / 2**30, 1),
            "gpus": [gpu.name for gpu in machine.gpus] if machine else [],
            "links": machine.links if machine else [],
            "driver": driver_version() if machine else None,
        },
        "versions": {
            "comfy-xdit-patch": __version__,
            "commit": _commit(),
            "comfyui": comfyui,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def cpu_model() -> str:
    """Return the CPU's name as the kernel has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    """Of this checkout; None where it is an archive."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
