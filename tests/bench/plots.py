"""Draw the ratios of ``bench.json``: a bar for each row that has one, and its quartiles.

Runs in: the rig's environment.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rows import Row

WIDTH_IN, ROW_IN, FRAME_IN = 11.0, 0.42, 1.6
NAME_CHARS = 72
BETTER, WORSE = "#2ca02c", "#d62728"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
DPI = 110


def draw(rows: Sequence[Row], about: dict[str, Any], path: Path) -> None:
    """Write the picture; rows without a ratio are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.ratio is not None and row.unit in ("s", "ms")]
    height = FRAME_IN + ROW_IN * len(shown)
    figure, axes = pyplot.subplots(figsize=(WIDTH_IN, height), layout="constrained")
    for place, row in enumerate(shown):
        assert row.ratio is not None
        assert row.spread is not None
        colour = BETTER if row.ratio <= 1 else WORSE
        axes.barh(place, row.ratio, color=colour, height=0.6)
        axes.hlines(place, *row.spread, color="black", linewidth=1.5)
        text = f" {row.ratio:.3g}  ({row.value:g} of {row.baseline:g} {row.unit})"
        beside = max(row.ratio, row.spread[1])
        axes.text(beside, place, text, va="center", fontsize=8, bbox=LABEL)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(
        range(len(shown)), [textwrap.fill(row.name, NAME_CHARS) for row in shown], fontsize=8
    )
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "time over its baseline's, median and quartiles of the rounds; below 1 is faster"
    )
    hardware, versions = about["hardware"], about["versions"]
    cards = ", ".join(hardware["gpus"]) or "no GPU"
    axes.set_title(
        f"{about['date']}: {hardware['cores']} cores of {hardware['cpu']}, {cards}; "
        f"ComfyUI {versions['comfyui']}, torch {versions['torch']}",
        fontsize=9,
        loc="left",
    )
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
