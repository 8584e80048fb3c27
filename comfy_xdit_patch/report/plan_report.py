"""``comfy-xdit plan``: the table of plans for a machine that need not be there.

Runs in: a process of its own, started by the user. No torch, no GPU.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.planning.cost.candidate import STRATEGY_LEGAL, is_built, parse_asked
from comfy_xdit_patch.planning.cost.choice import Choice, Option, choose, is_by_name
from comfy_xdit_patch.planning.cost.known_machines import CARDS, machine_of
from comfy_xdit_patch.planning.cost.known_models import MODELS
from comfy_xdit_patch.planning.cost.machine import LINK_KINDS, LINK_NAMES, Machine
from comfy_xdit_patch.planning.cost.model_shape import (
    COMPILED,
    EAGER,
    PRECISIONS,
    Job,
    workload_for,
)
from comfy_xdit_patch.planning.residency import gib
from comfy_xdit_patch.planning.transfers import TRANSFER_DTYPES

NUM_ROWS = 12
"""Rows of the table, the fastest first, without ``--all``."""

MAX_SIDE_PX = 16384
COLUMNS = ("plan", "GPUs", "ms/step", "of one GPU", "communication", "GiB/card", "")


@dataclass(frozen=True, slots=True)
class Table:
    """Lines for the user, and whether a plan was found."""

    text: str
    is_possible: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``comfy-xdit plan``."""
    parser.add_argument(
        "--gpus", required=True, help=f"such as 8x4090 or 1x4090+1x3090; of {', '.join(CARDS)}"
    )
    parser.add_argument("--link", choices=LINK_KINDS, help="between the GPUs (default: the cards')")
    parser.add_argument("--sockets", type=int, default=1, help="CPU sockets (default: 1)")
    parser.add_argument("--model", default="flux1-dev", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="of the weights (default: bf16)"
    )
    parser.add_argument("--size", default="1024x1024", help="of the image in px")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--cfg", action="store_true", help="a negative prompt, CFG above 1")
    parser.add_argument("--references", type=int, help="reference images of the same size")
    parser.add_argument(
        "--text-tokens", type=int, help="default: a short prompt as ComfyUI pads it"
    )
    parser.add_argument("--steps", type=int, help="default: as the model's templates")
    parser.add_argument("--compiled", action="store_true", help="no launches, no unfused kernels")
    parser.add_argument(
        "--graphs", action="store_true", help="ranks launch a step at once (XDIT_CUDA_GRAPHS=on)"
    )
    parser.add_argument(
        "--without",
        choices=("overlap",),
        help="compute nothing while q, k and v are on their way",
    )
    parser.add_argument(
        "--transfer-dtype",
        choices=TRANSFER_DTYPES,
        default="exact",
        help="in which form heads travel between ranks (default: exact; others are approximate)",
    )
    parser.add_argument("--strategy", default="auto", help=STRATEGY_LEGAL)
    parser.add_argument("--all", action="store_true", help="every plan, also those dropped")


def plan_table(options: argparse.Namespace) -> Table:
    """Make the table.

    Raises:
        SettingsError: an option has a value that is not legal.
    """
    try:
        asked = parse_asked(options.strategy)
    except ValueError:
        raise SettingsError(
            f'--strategy "{options.strategy}" is not legal. Legal: {STRATEGY_LEGAL}.'
        ) from None
    machine = machine_of(options.gpus, link=options.link, num_sockets=options.sockets)
    job = _job(options)
    lines = [*_header(options, job, machine), ""]
    choice = choose(job, machine, asked)
    if isinstance(choice, Refusal):
        return Table("\n".join([*lines, f"{choice.reason}."]), is_possible=False)
    lines += _rows(choice, is_whole=options.all)
    if options.all:
        lines += ["", "Dropped:"]
        lines += [f"  {drop.plan.name}: {drop.refusal.reason}" for drop in choice.dropped]
    else:
        lines += ["", *_summary(choice)]
    chosen = choice.chosen
    lines += ["", f"{asked.text} takes {chosen.plan.name}: {choice.why}."]
    if options.transfer_dtype != "exact" and chosen.plan.exchanges_heads:
        lines.append(
            f"Transfers in {options.transfer_dtype} are an approximation "
            f"(XDIT_TRANSFER_DTYPE={options.transfer_dtype})."
        )
    if not chosen.plan.is_exact:
        lines.append("PipeFusion is an approximation: its image differs from one GPU's.")
    return Table("\n".join(lines), is_possible=True)


def _job(options: argparse.Namespace) -> Job:
    shape = MODELS.get(options.model)
    if shape is None:
        raise SettingsError(
            f'--model "{options.model}" is not legal. Legal: {", ".join(sorted(MODELS))}.'
        )
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", options.size.lower())
    sides = [int(side) for side in match.groups()] if match else [0]
    if not 16 <= min(sides) <= max(sides) <= MAX_SIDE_PX:
        raise SettingsError(
            f'--size "{options.size}" is not legal. Legal: width x height in px such as 1024x768, '
            f"each from 16 to {MAX_SIDE_PX}."
        )
    for name, least in (("batch", 1), ("references", 0), ("text_tokens", 1), ("steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise SettingsError(
                f'--{name.replace("_", "-")} "{value}" is not legal. '
                f"Legal: a whole number from {least}."
            )
    return Job(
        shape=shape,
        workload=workload_for(
            shape,
            width_px=sides[0],
            height_px=sides[1],
            num_rows=options.batch * (2 if options.cfg else 1),
            num_text_tokens=options.text_tokens,
            num_references=options.references,
        ),
        precision=PRECISIONS[options.precision],
        num_steps=options.steps or shape.num_steps,
        execution=COMPILED if options.compiled else EAGER,
        overlaps=options.without != "overlap",
        transfer_dtype=options.transfer_dtype,
        captures=options.graphs,
    )


def _header(options: argparse.Namespace, job: Job, machine: Machine) -> list[str]:
    workload = job.workload
    kinds = {link.kind for a, row in enumerate(machine.links) for link in row[:a]}
    sources = sorted({f"{gpu.name} {CARDS[gpu.name].source}" for gpu in machine.gpus})
    links = ", ".join(LINK_NAMES[kind] for kind in sorted(kinds)) or "none"
    return [
        "Projected from a model of cost: nothing here was measured on these GPUs.",
        f"  model    {job.shape.name}, {job.precision.name}, {job.execution.name}"
        + ", CUDA graphs" * job.captures,
        f"  call     {workload.batch_size} row(s) of {workload.num_image_tokens} image, "
        f"{workload.num_text_tokens} text and {workload.num_reference_tokens} reference tokens",
        f"  machine  {options.gpus}, {options.sockets} socket(s); links: {links}",
        f"  rates    {', '.join(sources)} (docs/planning.md)",
    ]


def _rows(choice: Choice, *, is_whole: bool) -> list[str]:
    shown = list(choice.options if is_whole else choice.options[:NUM_ROWS])
    for option in (choice.chosen, choice.single):
        if option not in shown:
            shown.append(option)
    cells = [COLUMNS, *(_cells(option, choice) for option in shown)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(COLUMNS) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cells(option: Option, choice: Choice) -> tuple[str, ...]:
    time, notes = option.time, []
    if option is choice.chosen:
        notes.append("<- taken")
    if not is_built(option.plan):
        notes.append("not in this version")
    elif option.plan.tensor > 1 or is_by_name(option.plan, choice.options):
        notes.append("by name only")
    if not option.plan.is_exact:
        notes.append(f"approximate, by name only, {time.num_patches} patches")
    if option.need.mode == "cast":
        notes.append("weights cast once")
    if time.is_host_bound:
        notes.append("the CPU's launches set the pace")
    if not option.need.fits:
        notes.append("weights that do not fit come from CPU memory")
    return (
        option.plan.name,
        str(option.plan.world_size),
        f"{time.total_s * 1e3:.1f}",
        f"{option.speedup:.2f}x",
        f"{time.communication_s / time.total_s:.0%}",
        gib(option.need.num_bytes),
        "; ".join(notes),
    )


def _summary(choice: Choice) -> list[str]:
    """Count what is not shown."""
    hidden = max(0, len(choice.options) - NUM_ROWS)
    misfits = sum(drop.is_legal for drop in choice.dropped)
    return [
        f"{hidden} slower plans are not shown, {misfits} do not fit in memory, "
        f"{len(choice.dropped) - misfits} are not legal for this call. --all shows them."
    ]
