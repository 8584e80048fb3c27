"""Draw ``docs/parity.md`` as a picture: how far every exact plan is from stock ComfyUI.

Runs in: the process of ``docs/generate.py``; needs the standard library only.
"""

from __future__ import annotations

import math
import re

WIDTH_PX, HEIGHT_PX = 720, 300
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 64, 150, 40, 40
LOWEST, HIGHEST = 1e-8, 1e-4
"""Ends of the axis of errors. Plans that give the same bits stand on its lower end."""
BOUND = 1e-5
"""Of the tests; ``BOUND`` in tests/parallel/exactness.py."""
DOT_PX = 3.5
SPREAD_PX = 34
"""Half the width in which the plans of one number of ranks stand beside each other."""
COLOURS = {
    "ulysses": "#1f77b4",
    "ring": "#2ca02c",
    "tensor": "#d62728",
    "batch": "#9467bd",
    "several axes": "#7f7f7f",
}
TEXT = '<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'


def draw(page: str) -> str:
    """Return the picture of the page's table as SVG: a dot for each plan, its largest error."""
    plans: dict[int, list[tuple[str, float]]] = {}
    for num_ranks, plan, cells in re.findall(r"^\| (\d+) \| `(.*?)` \|(.*)\|$", page, re.MULTILINE):
        errors = [float(cell) for cell in cells.split("|") if "refused" not in cell]
        plans.setdefault(int(num_ranks), []).append((plan, max(errors)))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH_PX}" height="{HEIGHT_PX}" fill="white"/>',
        TEXT.format(
            x=LEFT_PX,
            y=20,
            anchor="start",
            text="Largest error of one forward against stock ComfyUI, float32, by number of ranks",
        ),
        *_axis(),
        *_legend(),
    ]
    step_px = (WIDTH_PX - LEFT_PX - RIGHT_PX) / len(plans)
    for place, (num_ranks, those) in enumerate(sorted(plans.items())):
        middle_px = LEFT_PX + (place + 0.5) * step_px
        lines.append(_label(middle_px, HEIGHT_PX - 16, f"{num_ranks} ranks"))
        for number, (plan, error) in enumerate(those):
            x = middle_px + SPREAD_PX * (2 * (number + 0.5) / len(those) - 1)
            lines.append(_dot(x, _height(error), _kind(plan), f"{plan}: {error:.1e}"))
    return "\n".join([*lines, "</svg>", ""])


def _height(error: float) -> float:
    part = math.log(max(error, LOWEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return HEIGHT_PX - BOTTOM_PX - part * (HEIGHT_PX - BOTTOM_PX - TOP_PX)


def _kind(plan: str) -> str:
    return "several axes" if "," in plan else plan.partition("=")[0]


def _axis() -> list[str]:
    lines = []
    for exponent in range(-8, -3):
        y = _height(10.0**exponent)
        text = "same bits" if exponent == -8 else f"1e{exponent}"
        lines += [_line(y, "#dddddd"), TEXT.format(x=LEFT_PX - 6, y=y + 4, anchor="end", text=text)]
    y = _height(BOUND)
    bound = TEXT.format(
        x=WIDTH_PX - RIGHT_PX + 6, y=y + 4, anchor="start", text="bound of the tests"
    )
    return [*lines, _line(y, "black"), bound]


def _legend() -> list[str]:
    lines = []
    for number, kind in enumerate(COLOURS):
        x, y = WIDTH_PX - RIGHT_PX + 14, 150 + 20 * number
        lines += [_dot(x, y, kind, kind), TEXT.format(x=x + 10, y=y + 4, anchor="start", text=kind)]
    return lines


def _line(y: float, colour: str) -> str:
    return f'<path d="M{LEFT_PX} {y:.1f}H{WIDTH_PX - RIGHT_PX}" stroke="{colour}"/>'


def _label(x: float, y: float, text: str) -> str:
    return TEXT.format(x=x, y=y, anchor="middle", text=text)


def _dot(x: float, y: float, kind: str, title: str) -> str:
    colour = COLOURS[kind]
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT_PX}" fill="{colour}">'
    return f"{circle}<title>{title}</title></circle>"
