"""What the demo found: its figures, ``summary.json``, the table, and the verdict.

Runs in: the rig's environment. The parallel figures are differences of two status readings, so
the warm-up image is not counted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rig.compare import MAX_PIXEL_DIFFERENCE, MIN_PSNR_DB, Difference
from rig.environment import RigError
from rig.outputs import Pixels
from rig.status_schema import counted
from rig.trees import Tree


def say(line: str) -> None:
    """Print a line of a measurement at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Run:
    """One image on one server."""

    images: list[Pixels]
    seconds_per_step: float
    ranks: int = 1
    strategy: str = "off"
    steps_parallel: int = 0
    steps_fell_back: int = 0
    fall_back_reasons: dict[str, int] = field(default_factory=dict)


def run_of(
    images: list[Pixels], seconds: float, before: dict[str, Any], after: dict[str, Any]
) -> Run:
    """Make a run from the status before and after it; both are empty for stock ComfyUI."""
    if not after:
        return Run(images=images, seconds_per_step=seconds)
    last, plan = after.get("last_run") or {}, after.get("plan") or {}
    reasons = {
        reason: count - counted(before["fell_back"]).get(reason, 0)
        for reason, count in counted(after["fell_back"]).items()
    }
    if last and plan and after["state"] not in ("ready", "idle"):
        raise RigError(f"the workers are {after['state']} after the image: {after['reason']}")
    return Run(
        images=images,
        seconds_per_step=seconds,
        ranks=len(after["ranks"]),
        strategy=str(last.get("strategy") or plan.get("strategy") or "none"),
        steps_parallel=after["totals"]["steps_parallel"] - before["totals"]["steps_parallel"],
        steps_fell_back=after["totals"]["steps_fell_back"] - before["totals"]["steps_fell_back"],
        fall_back_reasons={reason: count for reason, count in reasons.items() if count},
    )


def summary_of(
    tree: Tree,
    workflow: Path,
    shas: tuple[str, str],
    stock: Run,
    parallel: Run,
    difference: Difference,
    images: dict[str, str],
) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    return {
        "comfyui": tree.version,
        "workflow": {"path": str(workflow), "sha256_before": shas[0], "sha256_after": shas[1]},
        "ranks": parallel.ranks,
        "strategy": parallel.strategy,
        "steps": parallel.steps_parallel + parallel.steps_fell_back,
        "steps_parallel": parallel.steps_parallel,
        "steps_fell_back": parallel.steps_fell_back,
        "fall_back_reasons": parallel.fall_back_reasons,
        "max_pixel_difference": difference.max_pixel,
        "seconds_per_step": {
            "stock": round(stock.seconds_per_step, 4),
            "parallel": round(parallel.seconds_per_step, 4),
        },
        "images": images,
    }


def failure(summary: dict[str, Any], difference: Difference, ranks: int) -> str | None:
    """Return why the demo did not show what it promises, or None."""
    workflow = summary["workflow"]
    if summary["steps"] == 0:
        return "no step was run by the workers, and none was counted as fallen back."
    if summary["steps_fell_back"]:
        return (
            f"{summary['steps_fell_back']} of {summary['steps']} steps fell back: "
            f"{summary['fall_back_reasons']}."
        )
    if summary["ranks"] != ranks:
        return f"{summary['ranks']} ranks ran, {ranks} were asked for."
    if not difference.is_equal:
        return (
            f"the images differ: {difference}; "
            f"allowed is max {MAX_PIXEL_DIFFERENCE}/255 and PSNR {MIN_PSNR_DB} dB."
        )
    if workflow["sha256_before"] != workflow["sha256_after"]:
        return f"{workflow['path']} was changed during the demo."
    return None


def table(summary: dict[str, Any], difference: Difference) -> str:
    """Return the summary as text for people."""
    seconds = summary["seconds_per_step"]
    rows = [
        ("ComfyUI", summary["comfyui"]),
        ("workflow", summary["workflow"]["path"]),
        ("ranks, strategy", f"{summary['ranks']}, {summary['strategy']}"),
        ("steps in parallel", f"{summary['steps_parallel']} of {summary['steps']}"),
        ("steps fell back", str(summary["steps_fell_back"])),
        *((f"  {reason}", str(count)) for reason, count in summary["fall_back_reasons"].items()),
        ("s/step stock", f"{seconds['stock']:.3f}"),
        ("s/step parallel", f"{seconds['parallel']:.3f}"),
        ("speed-up", f"{seconds['stock'] / seconds['parallel']:.2f}"),
        ("difference", str(difference)),
        ("images", summary["images"]["side_by_side"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows)
