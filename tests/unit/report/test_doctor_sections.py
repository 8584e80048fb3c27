"""The doctor's arithmetic of memory."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.planning.strategy import parse_strategy
from comfy_xdit_patch.report.doctor_sections import memory_lines

CPU_RANKS = (Device("cpu"), Device("cpu"), Device("cpu"))


CAST_ONCE = (
    "weights cast once, modulation shared over the ranks, all else on every card: "
    "{} of 24.0 GiB on rank 0"
)


@pytest.mark.parametrize(
    ("dtype", "num_cards", "plan"),
    [
        (
            "bf16",
            2,
            "modulation shared over the ranks, all else on every card: 21.4 of 24.0 GiB on rank 0",
        ),
        (
            "bf16",
            4,
            "modulation shared over the ranks, all else on every card: 19.8 of 24.0 GiB on rank 0",
        ),
        (
            "bf16",
            8,
            "modulation shared over the ranks, all else on every card: 18.9 of 24.0 GiB on rank 0",
        ),
        ("fp8", 2, CAST_ONCE.format(21.4)),
        ("fp8", 4, CAST_ONCE.format(19.8)),
        ("fp8", 8, CAST_ONCE.format(18.9)),
    ],
)
def test_cards_of_24_gib(dtype, num_cards, plan):
    lines = memory_lines(CPU_RANKS, 24 << 30)
    start = next(
        index
        for index, line in enumerate(lines)
        if line.startswith(f"FLUX.1-dev {dtype} (") and line.endswith(f" {num_cards} cards:")
    )
    assert lines[start + 1].strip() == plan
    assert "weights" in lines[start + 2]


def test_the_cards_at_hand_are_planned_too():
    assert any("3 cards" in line for line in memory_lines(CPU_RANKS, 24 << 30))
    assert not any("3 cards" in line for line in memory_lines((), 24 << 30))


def test_without_a_budget_the_cards_own_memory_counts():
    gpus = tuple(Device(f"Card {n}", f"GPU-{n}", memory_bytes=80 << 30) for n in range(2))
    lines = memory_lines(gpus, None)
    assert lines[0] == "budget: what the cards have, 80.0, 80.0 GiB"
    assert sum(line.startswith("FLUX.1-dev") for line in lines) == 2
    assert "all weights on every card: 24.4 of 80.0 GiB on rank 0" in lines[2]


@pytest.mark.parametrize("devices", [(), CPU_RANKS, (Device("a", "GPU-1"), Device("b", "GPU-2"))])
def test_unknown_memory_is_said(devices):
    (line,) = memory_lines(devices, None)
    assert "Set XDIT_GPU_MEMORY" in line


def test_a_card_too_small_for_anything_is_refused_with_figures():
    text = "\n".join(memory_lines((), 1 << 30))
    assert text.count("refused: the model does not fit on") == 6
    assert "of 1.0 GiB" in text


@pytest.mark.parametrize(
    ("strategy", "where", "num_plans"),
    [
        ("auto", "modulation shared over the ranks, all else on every card: 19.8 of 24.0 GiB", 6),
        ("fsdp", "weights sharded over the ranks: 9.2 of 24.0 GiB", 6),
        ("ulysses=4,fsdp=4", "weights sharded over the ranks: 9.2 of 24.0 GiB", 2),
        (
            "ulysses=4,modulation=4",
            "modulation shared over the ranks, all else on every card: 19.8",
            2,
        ),
        ("tensor", "blocks cut by heads and columns: ", 6),
        ("pipefusion", "each stage's weights on its cards: ", 6),
        ("pipefusion=2,ulysses=2", "each stage's weights on its cards: ", 2),
    ],
)
def test_weights_lie_as_the_strategy_wants_them(strategy, where, num_plans):
    four = (Device("cpu"),) * 4
    lines = memory_lines(four, 24 << 30, parse_strategy(strategy))
    headings = [line for line in lines if line.startswith("FLUX.1-dev")]
    assert len(headings) == num_plans
    start = next(n for n, line in enumerate(lines) if "bf16" in line and "4 cards" in line)
    assert lines[start + 1].strip().startswith(where)
