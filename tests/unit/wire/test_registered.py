"""Memory that a driver locks; it is asked here by a stand-in, as no GPU is there."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.wire import registered
from comfy_xdit_patch.wire.slots import SlotTable

NO_MEMORY = 2


@pytest.fixture
def driver(monkeypatch):
    """Locks memory unless ``code`` is an error."""
    made = SimpleNamespace(locked={}, asked=0, code=0, given_back=[])

    def lock(address, size, flags):
        made.asked += 1
        if made.code == 0:
            made.locked[address] = size
        return made.code

    def unlock(address):
        made.given_back.append(made.locked.pop(address))

    runtime = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=unlock)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    registered._say_that_it_failed.cache_clear()
    return made


def test_a_slot_is_locked_whole_and_once_until_it_ends(driver):
    slot = SlotTable().create(5000)
    assert driver.asked == 0, "nobody has wanted to copy"
    assert slot.is_registered
    assert slot.is_registered
    assert (driver.asked, [*driver.locked.values()]) == (1, [8192])
    del slot
    gc.collect()
    assert (driver.locked, driver.given_back) == ({}, [8192])


def test_what_the_driver_does_not_lock_is_said_once_and_not_tried_again(driver, caplog):
    caplog.set_level(logging.INFO)
    driver.code = NO_MEMORY
    table = SlotTable()
    slots = [table.create(5000) for _ in range(2)]
    assert not any(slot.is_registered for slot in (*slots, *slots))
    assert driver.asked == 2
    assert [record.getMessage() for record in caplog.records] == [
        "xDiT: the driver locks no shared memory; copies to and from the GPU are waited for"
    ]
    del slots, table
    gc.collect()
    assert driver.given_back == [], "none was locked"
