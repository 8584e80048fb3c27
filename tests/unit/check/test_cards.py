"""Memory of cards, as nvidia-smi has it."""

from __future__ import annotations

import time

import pytest
from rig.server import EMULATED

from comfy_xdit_patch.check import cards
from comfy_xdit_patch.hardware.survey import driver_version


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """The stand-in of two emulated cards; returns where its ledger is."""
    ledger = tmp_path / "cards"
    monkeypatch.setenv("PATH", f"{EMULATED / 'bin'}:/usr/local/bin:/usr/bin:/bin")
    monkeypatch.setenv("EMULATED_CARDS", "4090:4,4090")
    monkeypatch.setenv("EMULATED_LEDGER", str(ledger))
    return ledger


@pytest.fixture
def books(nvidia_smi, monkeypatch):
    """The ledger, as a process that computes has it."""
    monkeypatch.syspath_prepend(str(EMULATED))
    from emulated_ledger import Ledger

    return Ledger(nvidia_smi)


def test_what_all_processes_use_is_read_in_bytes(books):
    books.take(1, 300 << 20, 1 << 40)
    used = cards.used_bytes()
    assert list(used.values()) == [0, 300 << 20]
    assert driver_version() == "580.00.00"


def test_the_most_is_kept(books, monkeypatch):
    monkeypatch.setattr(cards, "POLL_S", 0.01)
    books.take(0, 200 << 20, 1 << 40)
    with cards.MemoryWatch() as watch:
        end = time.monotonic() + 20
        while not watch.most and time.monotonic() < end:
            time.sleep(0.01)
        books.give_back(0, 100 << 20)
    assert max(watch.most.values()) == 200 << 20
    assert max(cards.used_bytes().values()) == 100 << 20


def test_without_nvidia_smi_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards.used_bytes() == {}
    assert driver_version() is None
    with cards.MemoryWatch() as watch:
        pass
    assert watch.most == {}
