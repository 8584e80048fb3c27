"""Machines that planning is tested on, and the tables of docs/planning.md.

Runs in: pytest, or a process of its own; no ComfyUI.

python -m rig.planning_tables      from tests/: write the tables into the page
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.balance import Balance
from comfy_xdit_patch.planning.cost.candidate import is_built
from comfy_xdit_patch.planning.cost.choice import Choice, choose
from comfy_xdit_patch.planning.cost.known_machines import CARDS, machine_of
from comfy_xdit_patch.planning.cost.machine import Machine
from comfy_xdit_patch.planning.cost.model_shape import Job
from rig.published import ROWS, make_job, median_error
from rig.unequal import SPEEDS, Ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"


@dataclass(frozen=True)
class Case:
    """A machine and what runs on it.

    ``published`` is the nearest published time of a step, where there is one.
    """

    machine: Machine
    precision: str = "bf16"
    published: str = "none"

    def choice(self, **changes: object) -> Choice:
        job: Job = make_job(precision=self.precision, **changes)  # type: ignore[arg-type]
        choice = choose(job, self.machine)
        assert not isinstance(choice, Refusal), choice.reason
        return choice


# 24 GiB cards hold FLUX.1 in fp8: its weights are 22.2 GiB in bf16.
MACHINES = {
    "1x4090": Case(machine_of("1x4090"), "fp8", "541 ms, ComfyUI"),
    "2x4090": Case(machine_of("2x4090"), "fp8"),
    "8x4090, 2 sockets": Case(machine_of("8x4090", num_sockets=2), "fp8"),
    "1x4090+1x3090": Case(machine_of("1x4090+1x3090"), "fp8"),
    "4x5090": Case(machine_of("4x5090")),
    "4x5090, peer-to-peer driver": Case(machine_of("4x5090", link="pcie")),
    "2xl20": Case(machine_of("2xl20"), published="480 ms, ring=2 (512 text tokens)"),
    "4xl20": Case(machine_of("4xl20"), published="296 ms, ulysses=4 (512 text tokens)"),
    "4xl40s, 2 sockets": Case(machine_of("4xl40s", num_sockets=2)),
    "8xl40, 2 sockets": Case(machine_of("8xl40", num_sockets=2), published="4 beat 8 GPUs"),
    "2xrtx2000ada": Case(machine_of("2xrtx2000ada"), "fp8", "1260 ms, ulysses=2"),
    "4xa100": Case(machine_of("4xa100"), published="123 ms, ulysses=2,ring=2, compiled"),
    "8xa100": Case(machine_of("8xa100")),
    "2xh100": Case(machine_of("2xh100"), published="75 ms, ring=2, compiled"),
    "4xh100": Case(machine_of("4xh100"), published="40 ms, ulysses=4, compiled"),
    "8xh100": Case(machine_of("8xh100")),
}


def calibration() -> list[str]:
    """Every published row beside its prediction."""
    lines = [
        "| source | GPUs | plan | model | kernels | published s | model s | error | use | remark |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        lines.append(
            f"| {row.source} | {row.gpus} | {row.plan} | {row.model} {row.precision} "
            f"{row.px} px | {row.execution} | {row.seconds:.3f} | {row.predicted_s:.3f} | "
            f"{row.error:+.0%} | {row.use} | {row.remark} |"
        )
    tests = [row for row in ROWS if row.use == "test"]
    met = [row for row in tests if not row.remark]
    beyond = sum(abs(row.error) > 0.1 for row in ROWS)
    return [
        *lines,
        "",
        f"Median of the errors' sizes: {median_error(ROWS):.1%} over all {len(ROWS)} rows, "
        f"{median_error(tests):.1%} over the {len(tests)} that set no constant, "
        f"{median_error(met):.1%} over the {len(met)} of those without a remark. "
        f"{beyond} rows are beyond 10 %, each with a remark.",
    ]


def choices() -> list[str]:
    """What ``auto`` takes on every machine, for FLUX.1-dev at 1024 px and 256 text tokens."""
    lines = [
        "| machine | weights | kernels | `auto` takes | ms/step | of one GPU | fastest by name "
        "| ms/step | published ms/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in MACHINES.items():
        for execution in ("eager", "compiled"):
            choice = case.choice(execution=execution)
            chosen, approximate = choice.chosen, _approximate(choice)
            lines.append(
                f"| {name} | {case.precision} | {execution} | {chosen.plan.name} | "
                f"{chosen.time.total_s * 1e3:.0f} | {chosen.speedup:.2f}x | {approximate} | "
                f"{case.published} |"
            )
    return lines


TRANSFERS = (
    *((f"{n}x4090", weights, "eager") for n in (2, 4, 8) for weights in ("bf16", "fp8")),
    *((machine, "bf16", "eager") for machine in ("4x5090", "4xl40s", "4xl20", "8xh100")),
    ("8xh100", "bf16", "compiled"),
)
"""Machines, how weights are stored, and how kernels start."""


def transfers() -> list[str]:
    """What heads in 8 bits are worth, and what is left of a step with them."""
    lines = [
        "| machine | weights | kernels | `exact` | ms/step | of one GPU | in 8 bits | ms/step "
        "| of one GPU | of it compute | communication | launches |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for machine, weights, execution in TRANSFERS:
        case = Case(machine_of(machine), weights)
        exact, narrow = (
            case.choice(execution=execution, transfer_dtype=dtype).chosen
            for dtype in ("exact", "int8")
        )
        cells = [machine, weights, execution]
        for option in (exact, narrow):
            cells += [option.plan.name, f"{option.time.total_s * 1e3:.0f}"]
            cells.append(f"{option.speedup:.2f}x")
        time = narrow.time
        parts = (time.compute_s, time.communication_s, time.host_s)
        cells += [f"{seconds * 1e3:.0f}" for seconds in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def constants() -> list[str]:
    """Every card of the table."""
    lines = [
        "| card | linears | fp8 linears | memory | links | rates are |",
        "|---|---|---|---|---|---|",
    ]
    for card in CARDS.values():
        rate = f"{card.nvlink:.0f} GB/s" if card.nvlink else f"PCIe 4.0 x16 x {card.pcie:g}"
        lines.append(
            f"| {card.name} | {card.linear:g} TFLOP/s | {card.fp8 or '-'} | "
            f"{card.memory_mib / 1024:.0f} GiB, {card.memory:g} GB/s | {card.link}, {rate} | "
            f"{card.source} |"
        )
    return lines


def unequal() -> list[str]:
    """What ``XDIT_BALANCE=adaptive`` is worth, in simulation."""
    lines = [
        "| speeds | even split, first 4 calls | 5th call | 10th | 20th | changes in 20 |",
        "|---|---|---|---|---|---|",
    ]
    for speeds in SPEEDS:
        ranks = Ranks(Balance("adaptive", len(speeds)), *speeds)
        cells = [f"{ranks.run(num_calls).efficiency:.0%}" for num_calls in (4, 1, 5, 10)]
        cells += [", ".join(map(str, speeds)), str(ranks.balance.num_changes)]
        lines.append(f"| {cells[4]} | {' | '.join(cells[:4])} | {cells[5]} |")
    return lines


def _approximate(choice: Choice) -> str:
    plans = [option for option in choice.options if is_built(option.plan)]
    found = [option for option in plans if not option.plan.is_exact]
    if not found:
        return "- | -"
    return f"{found[0].plan.name} | {found[0].time.total_s * 1e3:.0f}"


def page() -> str:
    """Return docs/planning.md with its tables made anew."""
    text = PAGE.read_text()
    for name, make in (
        ("calibration", calibration),
        ("choices", choices),
        ("constants", constants),
        ("transfers", transfers),
        ("unequal", unequal),
    ):
        made = "\n".join([f"<!-- {name} -->", "", *make(), "", f"<!-- /{name} -->"])
        marks = re.compile(f"<!-- {name} -->.*<!-- /{name} -->", re.DOTALL)
        assert marks.search(text), f"docs/planning.md has no place for {name}"
        text = marks.sub(lambda _, made=made: made, text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
