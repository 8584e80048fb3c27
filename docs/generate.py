"""Write what is made of docs/: settings.md, patch-points.md, compatibility.md and a picture.

Runs in: a process of its own, with torch and wrapt installed; ComfyUI is not needed.

    python docs/generate.py            write the pages
    python docs/generate.py --check    compare only; exit status 1 and their names if they differ
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity_plot

DOCS = Path(__file__).resolve().parent
PACKAGE = "comfy_xdit_patch"
MADE = (
    "<!-- Made by docs/generate.py from {source}. Do not edit: change the source, run it again. -->"
)


def main(arguments: list[str]) -> int:
    """Write or compare all pages; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    is_check = parser.parse_args(arguments).check
    use_this_checkout()
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not is_check:
            path.write_text(text)
    verb = "differ from the code; run docs/generate.py" if is_check else "written"
    if stale:
        sys.stdout.write(f"{', '.join(stale)}: {verb}\n")
    return 1 if is_check and stale else 0


def use_this_checkout() -> None:
    """Import the package from beside this folder, even where the interpreter started another."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(DOCS.parent))


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {
        "settings.md": settings_page(),
        "patch-points.md": patch_points_page(),
        "compatibility.md": compatibility_page(),
        "pictures/parity.svg": parity_plot.draw((DOCS / "parity.md").read_text()),
    }


CHANGES = """\
## Without a restart

    curl -H 'Content-Type: application/json' http://127.0.0.1:8188/xdit/settings \\
         -d '{"XDIT_STRATEGY": "ring", "XDIT_GPUS": "0,1"}'

Values are as in the environment; `null` is the environment's own again. All of them hold from the
next prompt on, or none: a wrong one is answered by 400 with the legal values. While a prompt runs
the answer is 202, they wait for its end (`pending`), and later ones take their place.
`GET /xdit/settings` has the values of now, of the environment, and those that wait.

`XDIT_STRATEGY=off` switches off: ComfyUI computes alone, and workers and nursery end. `auto` or
`null` switches on again. Ranks go on, with the models that they hold, unless `XDIT_GPUS`,
`XDIT_CPU_THREADS`, `XDIT_STEP_TIMEOUT` or `XDIT_STRICT` change; then new ones start at once.
`POST /xdit/measure` with `{}` has `auto` measure again what it remembers.

Only this machine may do it, unless `XDIT_REMOTE_SETTINGS=1`; see [security](security.md). A
ComfyUI that was started switched off, or with a wrong value, has to be started again; so does one
that is to have another `XDIT_LOG_DIR`. Nothing is kept: the next start has the environment's
values.
"""


def settings_page() -> str:
    """Return the page of all XDIT_* variables."""
    from comfy_xdit_patch.variables import VARIABLES

    lines = [
        MADE.format(source="comfy_xdit_patch/variables.py"),
        "",
        "# Settings",
        "",
        "Environment variables of the ComfyUI process, read once when ComfyUI's modules are",
        "imported. A wrong value, or an `XDIT_` name that is not in this table, is one error in",
        "the log, and ComfyUI runs as if the package were not there.",
        "",
        "| variable | default | legal values |",
        "|---|---|---|",
        *(f"| `{v.name}` | `{v.default}` | {_cell(v.legal)} |" for v in VARIABLES),
        "",
        *CHANGES.splitlines(),
    ]
    for variable in VARIABLES:
        lines += ["", f"## {variable.name}", "", variable.meaning]
    return "\n".join(lines) + "\n"


class NoWrappers:
    """Stands for ``patching.wrappers.Wrappers``: every wrapper of it does nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _no_wrapper


def _no_wrapper(*_: Any) -> None:
    return None


def patch_points_page() -> str:
    """Return the page of every attribute of ComfyUI that is touched."""
    from comfy_xdit_patch.host.guest.points import (
        control_points,
        decode_points,
        execution_points,
        sampling_points,
        server_points,
    )

    stand_in: Any = NoWrappers()
    lines = [
        MADE.format(source="comfy_xdit_patch/host/guest/points.py"),
        "",
        "# Patch points",
        "",
        "Every attribute of ComfyUI that the package wraps, and why. Classes are never replaced.",
        "A set of points is applied as a whole or not at all: if one attribute is missing or",
        "lacks a parameter named here, ComfyUI stays as it is and the log names the misfit. A",
        "wrapper that is switched off stays where it is and calls straight through. With",
        "`XDIT_STRATEGY=off` or `XDIT_GPUS=0` nothing is wrapped.",
        "",
        "## Sampling",
        "",
        *_points_table(sampling_points(stand_in)),
        "",
        "## ControlNets",
        "",
        "Without these, ControlNets run on one GPU and their residuals are carried.",
        "",
        *_points_table(control_points(stand_in)),
        "",
        "## Pictures",
        "",
        "Without this, pictures are decoded on one GPU.",
        "",
        *_points_table(decode_points(stand_in)),
        "",
        "## Prompts",
        "",
        "Without this, each sampling run has a line of its own in the log.",
        "",
        *_points_table(execution_points(stand_in)),
        "",
        "## Server",
        "",
        "A set of its own: without it there is no status route, and sampling is parallel all the",
        "same.",
        "",
        *_points_table(server_points(_no_wrapper)),
    ]
    return "\n".join(lines) + "\n"


def compatibility_page() -> str:
    """Return the page of what graphs do and what becomes of it, as a run of the tests found it."""
    sections = json.loads((DOCS / "compatibility.json").read_text())
    rows = [row for section in sections.values() for row in section.values()]
    versions = sorted({version for row in rows for version in row["found"]}, key=_as_numbers)
    exact, rounded = (_compared(rows, is_rounded=value) for value in (False, True))
    lines = [
        MADE.format(source="docs/compatibility.json, which the tests write"),
        "",
        "# What runs in parallel",
        "",
        "Every row is a graph that the tests run on ComfyUI as it is and on ComfyUI with this",
        "package, on CPU ranks, with tiny models. Both make the same image in every row, whatever",
        f"stands in it. Pairs of runs compared: {len(exact)}; {_worst(exact)}. Where a graph",
        f"has the model compute in 16 bits: {_worst(rounded)},",
        "as much as another of ComfyUI's attention functions makes.",
        "",
        "- **parallel**: every step is computed by all ranks together.",
        "- **parallel with gather**: so too, but a node's own code is given all tokens, collected",
        "  for it on every rank, or in ComfyUI while the blocks run on the ranks. Steps in which",
        "  a cache leaves all blocks out need no ranks.",
        "- **falls back**: ComfyUI computes these steps on one GPU, as without this package. Where",
        "  only some steps of a graph do so, it says how many.",
        "",
        "The rule for what nodes set, in this order:",
        "",
        "| what it is | what becomes of it |",
        "|---|---|",
        "| what this model never reads | parallel |",
        "| what works outside of the model: samplers, guiders, wrappers | parallel |",
        "| a patch known to look at one token at a time | parallel |",
        "| a patch inside a block that keeps nothing between calls | parallel with gather |",
        "| code around the blocks: a loop of its own, a function in a block's place, tokens added "
        "before the first block, a class, a `forward` or a module of its own, hooks on a block | "
        "parallel with gather |",
        "| anything else | falls back, with its reason in the log |",
        "",
        "Node packs are tested by stand-ins that reach into ComfyUI as the pack does; once, the",
        "[packs themselves](node-packs.md) were run. See [troubleshooting](troubleshooting.md) for",
        "the reasons.",
    ]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", f"| | {' | '.join(versions)} | why |"]
        lines += ["|---" * (len(versions) + 2) + "|"]
        for name, row in section.items():
            cells = [_outcome(row["found"].get(version, {})) for version in versions]
            lines.append(f"| {_cell(name)} | {' | '.join(cells)} | {_cell(_why(row))} |")
    return "\n".join(lines) + "\n"


def _compared(rows: list[dict[str, Any]], *, is_rounded: bool) -> list[dict[str, Any]]:
    """Return the runs whose images were compared."""
    chosen = [row for row in rows if row["is_rounded"] == is_rounded]
    runs = [run for row in chosen for runs in row["found"].values() for run in runs.values()]
    return [run for run in runs if run["max_pixel"] is not None]


def _worst(runs: list[dict[str, Any]]) -> str:
    """Say the largest differences of runs."""
    pixel, psnr = max(run["max_pixel"] for run in runs), min(run["psnr_db"] for run in runs)
    return f"at most {pixel} of 255, PSNR at least {psnr:.0f} dB"


def _as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _outcome(runs: dict[str, Any]) -> str:
    """Return one cell: the outcome on the fewest ranks, the others being held to the same."""
    if not runs:
        return "not run"
    run = runs[min(runs, key=int)]
    fell_back, steps = run["steps_fell_back"], run["steps_parallel"] + run["steps_fell_back"]
    if run["outcome"] == "not seen":
        return "falls back"
    if 0 < fell_back < steps:
        return f"falls back ({fell_back} of {steps} steps)"
    return str(run["outcome"])


def _controls_alone(run: dict[str, Any]) -> list[str]:
    """Return why ComfyUI computes the ControlNets of a row itself."""
    return [f"its ControlNet runs on one GPU: {reason}" for reason in run["controls_alone"]]


def _why(row: dict[str, Any]) -> str:
    reasons = {
        reason: None
        for runs in row["found"].values()
        for run in runs.values()
        for reason in (*run["reasons"], *run.get("gather_reasons", ()), *_controls_alone(run))
    }
    return row["why"] or "; ".join(reasons)


def _points_table(points: Any) -> list[str]:
    lines = ["| attribute | parameters it must have | why |", "|---|---|---|"]
    for point in points:
        parameters = ", ".join(f"`{name}`" for name in sorted(point.parameters)) or "(any)"
        why = point.reason
        if point.hidden_from_dynamo:
            why += " Hidden from Dynamo, so that a compiled model is reached too."
        lines.append(f"| `{point.name}` | {parameters} | {_cell(why)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
