"""What the check prints, what it writes for others, and whether the product works.

Runs in: the check's process. Pure: results in, text out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from comfy_xdit_patch.check.cases import OURS, SPLIT, STOCK, CaseResult
from comfy_xdit_patch.check.comparison import bound_of
from comfy_xdit_patch.check.machine import Machine
from comfy_xdit_patch.check.model_file import Sizes
from comfy_xdit_patch.planning.residency import gib

SCHEMA = 1
COLUMNS = 100
CARDS_A_LINE = 3
NONE = "-"
MAX_ERROR_LINES = 12


@dataclass(frozen=True, slots=True)
class Setup:
    """What was run, with which versions. ``links`` and cards are the machine's."""

    package: str
    comfyui: str | None
    driver: str | None
    machine: Machine
    sizes: Sizes
    size_px: int
    num_steps: int


def find(results: Sequence[CaseResult], name: str) -> CaseResult | None:
    """Return the result of a case, if it was run."""
    return next((result for result in results if result.name == name), None)


def rounding_bound(results: Sequence[CaseResult]) -> float | None:
    """Return how far a latent may be from stock's; None where two stock runs are not there."""
    split = find(results, SPLIT)
    return bound_of(split.difference) if split is not None and split.difference else None


def fault_of(result: CaseResult | None, bound: float | None, *, num_ranks: int) -> str | None:
    """Say what is wrong with a case of ours; None if nothing is."""
    if result is None:
        return "it was not run"
    if result.error is not None:
        return result.error
    run = result.run or {}
    steps, parallel = run.get("steps", 0), run.get("steps_parallel", 0)
    if not 0 < steps == parallel:
        return f"{parallel} of {steps} steps were parallel"
    if len(result.forwards) != num_ranks or set(result.forwards) != {steps}:
        return f"the ranks computed {list(result.forwards)} steps of {steps}"
    if result.difference is None or bound is None:
        return "there are no two stock images to compare with"
    if result.difference.max_error > bound:
        return (
            f"the latent is {result.difference.max_error:.1e} from stock's, "
            f"and rounding is at most {bound:.1e}"
        )
    return None


def verdict(results: Sequence[CaseResult], *, num_ranks: int) -> tuple[str, bool]:
    """Return one line, and whether the product works here: by the case with default options."""
    bound = rounding_bound(results)
    ours = find(results, OURS)
    fault = fault_of(ours, bound, num_ranks=num_ranks)
    if fault is not None:
        return f"It does not work here: {fault.splitlines()[0]}", False
    assert ours is not None
    assert ours.difference is not None
    assert ours.run is not None
    ranks = (
        f"in parallel on {num_ranks} GPUs"
        if num_ranks > 1
        else "on one rank (there is one GPU, and nothing was shared)"
    )
    text = (
        f"It works here: {ours.run['steps_parallel']} of {ours.run['steps']} steps "
        f"{ranks}, error {ours.difference.max_error:.1e} of at most {bound:.1e}"
    )
    times = _speed(ours, find(results, STOCK))
    text += f", {times} times stock's speed." if times != NONE else "."
    for other in results:
        if other.is_ours and other is not ours:
            fault = fault_of(other, bound, num_ranks=num_ranks)
            text += f" Not so with {other.name}: {fault.splitlines()[0]}." if fault else ""
    return text, True


def table(setup: Setup, results: Sequence[CaseResult]) -> str:
    """Return everything but the verdict, in lines of 100 columns."""
    machine, sizes = setup.machine, setup.sizes
    lines = [
        f"comfy-xdit-patch {setup.package}, ComfyUI {setup.comfyui or 'unknown'}, torch "
        f"{machine.torch}, CUDA {machine.cuda or 'none'}, NCCL {machine.nccl or 'none'}, "
        f"driver {setup.driver or 'unknown'}",
        f"FLUX.1 of width {sizes.width}, {sizes.num_double} double and {sizes.num_single} single "
        f"blocks, bf16, random weights; {setup.size_px} x {setup.size_px} px, "
        f"{setup.num_steps} steps",
        "",
        "Cards",
    ]
    for rank, gpu in enumerate(machine.gpus):
        lines.append(f"  rank {rank}: {gpu.name}, {gib(gpu.memory_bytes)} GiB, {gpu.uuid}")
    lines += [f"  {line}" for line in machine.links]
    lines += ["", "Images", *_image_rows(results)]
    lines += [
        "",
        "Memory of each card in GiB, before / at most / after Free",
        *_memory_rows(machine, results),
    ]
    for result in results:
        if result.residency:
            plan = (result.run or {}).get("plan") or "no plan"
            lines += ["", f"Planned, {result.name}: {plan}"]
            lines += [f"  {line}" for line in result.residency]
    for result in results:
        reasons = result.fall_back_reasons or {}
        lines += [f"{result.name} fell back {n} times: {why}" for why, n in reasons.items()]
        if result.error:
            lines += ["", f"{result.name} failed"]
            lines += [f"  {line}" for line in result.error.splitlines()[:MAX_ERROR_LINES]]
    return "\n".join(part for line in lines for part in _wrapped(line))


def as_json(
    setup: Setup, results: Sequence[CaseResult], *, text: str, is_working: bool
) -> dict[str, Any]:
    """Return what others need to see what happened; the latents are not in it."""
    cases = [asdict(result) for result in results]
    for case in cases:
        del case["latent"]
    return {
        "schema": SCHEMA,
        "is_working": is_working,
        "verdict": text,
        "bound": rounding_bound(results),
        "setup": asdict(setup),
        "cases": cases,
    }


def _image_rows(results: Sequence[CaseResult]) -> list[str]:
    head = (
        "case",
        "parallel",
        "max error",
        "PSNR dB",
        "s/step",
        "x stock",
        "outside ms",
        "bound by",
    )
    rows = [head]
    stock = find(results, STOCK)
    for result in results:
        run, apart = result.run, result.difference
        psnr = apart and apart.psnr_db
        rows.append(
            (
                result.name,
                NONE if run is None else f"{run['steps_parallel']} of {run['steps']}",
                NONE if apart is None else f"{apart.max_error:.1e}",
                NONE if psnr is None else f"{psnr:.1f}",
                NONE if result.seconds_per_step is None else f"{result.seconds_per_step:.3f}",
                _speed(result, stock),
                NONE if result.outside_s is None else f"{1000 * result.outside_s:.1f}",
                _pace(result),
            )
        )
    bound = rounding_bound(results)
    note = [] if bound is None else [f"  An error of {bound:.1e} is allowed, for rounding."]
    return [*_columns(rows), *note]


def _memory_rows(machine: Machine, results: Sequence[CaseResult]) -> list[str]:
    cards = [f"rank {rank} of {gib(gpu.memory_bytes)}" for rank, gpu in enumerate(machine.gpus)]
    rows = [("case", *cards)]
    for result in results:
        cells = []
        for card in result.memory:
            parts = (card.before_bytes, card.most_bytes, card.after_free_bytes)
            cells.append(" / ".join(NONE if part is None else gib(part) for part in parts))
        rows.append((result.name, *cells))
    lines: list[str] = []
    for first in range(1, len(cards) + 1, CARDS_A_LINE):
        lines += _columns([(row[0], *row[first : first + CARDS_A_LINE]) for row in rows])
    return lines


def _speed(result: CaseResult, stock: CaseResult | None) -> str:
    if stock is None or not stock.seconds_per_step or not result.seconds_per_step:
        return NONE
    return f"{stock.seconds_per_step / result.seconds_per_step:.2f}"


def _pace(result: CaseResult) -> str:
    """What sets the pace of the ranks, where they know it."""
    known = [is_bound for is_bound in result.launch_bound if is_bound is not None]
    if not known:
        return NONE
    return "launches" if any(known) else "GPU"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, COLUMNS, subsequent_indent=indent, drop_whitespace=True) or [""]
