"""Emulated cards: one ledger for all processes, and torch's allocator on it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rig.server import EMULATED

MIB = 1 << 20
CARD_MIB = 2048
OTHER = """
import sys
sys.path.insert(0, sys.argv[1])
from emulated_ledger import Ledger
print(Ledger(sys.argv[4]).take(0, int(sys.argv[2]), int(sys.argv[3])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "cards")


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, path: str) -> Any:
    monkeypatch.syspath_prepend(str(EMULATED))
    return importlib.import_module("emulated_ledger").Ledger(path)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch, ledger: Any) -> Iterator[Any]:
    """The allocator of a process that has used no card yet."""
    monkeypatch.setenv("EMULATED_CARDS", f"4090:{CARD_MIB / 1024},3090")
    module = importlib.import_module("emulated_allocator")
    monkeypatch.setattr(module, "BOOKS", ledger)
    for name in ("_active", "_reserved", "_peak"):
        monkeypatch.setattr(module, name, {})
    for name in ("_contexts", "_groups"):
        monkeypatch.setattr(module, name, set())
    return module


class Other:
    """Another process, which takes so much of card 0."""

    def __init__(self, path: str, num_bytes: int, limit: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(EMULATED), str(num_bytes), str(limit), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.got = self.process.stdout.readline().strip() == "True"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_processes_share_a_card_and_one_that_ends_gives_all_back(ledger: Any, path: str) -> None:
    other = Other(path, 60, 100)
    assert other.got
    assert ledger.take(0, 40, 100)
    assert not ledger.take(0, 1, 100), "the card is full"
    assert ledger.take(1, 1, 100), "another one is not"
    assert ledger.by_process(0) == {other.process.pid: 60, os.getpid(): 40}
    other.end()
    assert ledger.used(0) == 40
    assert ledger.take(0, 60, 100)
    assert (ledger.used(0), ledger.peak(0)) == (100, 100)
    ledger.give_back(0, 70)
    ledger.forget_peaks()
    assert (ledger.used(0), ledger.peak(0)) == (30, 30)


def test_tensors_that_are_gone_leave_memory_that_others_find_kept(
    allocator: Any, ledger: Any
) -> None:
    allocator.take(0, 500 * MIB)
    assert ledger.used(0) == 1100 * MIB, "with a context"
    allocator.give_back(0, 500 * MIB)
    assert ledger.used(0) == 1100 * MIB, "torch keeps it"
    allocator.take(0, 200 * MIB)
    assert (allocator.active(0), allocator.reserved(0)) == (200 * MIB, 500 * MIB)
    allocator.empty_cache()
    assert ledger.used(0) == 800 * MIB
    assert (allocator.peak(0), ledger.peak(0)) == (500 * MIB, 1100 * MIB)


def test_a_card_that_is_full_raises_what_cuda_raises(allocator: Any) -> None:
    allocator.take(0, 1000 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate"):
        allocator.take(0, 500 * MIB)
    allocator.give_back(0, 900 * MIB)
    allocator.take(0, 1200 * MIB)  # of what is kept, and of what is free
    assert allocator.free_and_total(0) == ((CARD_MIB - 600 - 1300) * MIB, CARD_MIB * MIB)


def test_a_communicator_takes_memory_once(allocator: Any, ledger: Any) -> None:
    for group in ("world", "world", "weights"):
        allocator.join_group(0, group)
    assert ledger.used(0) == 2 * 256 * MIB
    allocator.leave_groups()
    assert ledger.used(0) == 0


def test_a_card_of_one_process_is_busy_for_another(
    allocator: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATED_MODE", "Exclusive_Process")
    other = Other(path, 600, 1000)
    with pytest.raises(RuntimeError, match="busy or unavailable"):
        allocator.take(0, 1)
    allocator.take(1, 1)
    other.end()
    allocator.take(0, 1)


def test_a_process_sees_the_cards_that_it_is_given(
    allocator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [card.kind.capability for card in allocator.visible_cards()] == [(8, 9), (8, 6)]
    second = allocator.card_of(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", second.uuid)
    assert [card.number for card in allocator.visible_cards()] == [1]
    assert second.total_bytes == 24 << 30
