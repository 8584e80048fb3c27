"""What is used of devices: asked of NVML and of the kernel, and not too often."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from types import SimpleNamespace as Namespace

import pytest

from comfy_xdit_patch.hardware import usage
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.hardware.usage import Gauge, Usage, process_ticks, resident_bytes

CARD = Device("H100", "GPU-1", 80 << 30)
CPU = Device("cpu")


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A library that knows one card, and counts what it is asked."""
    stand_in = types.ModuleType("pynvml")
    stand_in.NVMLError = NVMLError
    stand_in.asked = []

    def handle(uuid):
        stand_in.asked.append(uuid)
        if uuid != "GPU-1":
            raise NVMLError("not found")
        return uuid

    stand_in.nvmlInit = lambda: None
    stand_in.nvmlDeviceGetHandleByUUID = handle
    stand_in.nvmlDeviceGetMemoryInfo = lambda _: Namespace(total=100, used=60, free=40)
    stand_in.nvmlDeviceGetUtilizationRates = lambda _: Namespace(gpu=75)
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    return stand_in


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, which stands until it is told otherwise."""
    now = Namespace(s=100.0)
    monkeypatch.setattr(usage.time, "monotonic", lambda: now.s)
    return now


def test_a_card_is_asked_of_nvml_once_a_second_at_most(nvml, clock):
    gauge = Gauge()
    for _ in range(5):
        assert gauge.read([(CARD, 42)], cpu_threads=1) == [Usage(100, 60, 40, 0.75)]
    assert nvml.asked == ["GPU-1"]
    clock.s += usage.PERIOD_S
    gauge.read([(CARD, 42)], cpu_threads=1)
    assert len(nvml.asked) == 2
    gauge.read([(CARD, 43)], cpu_threads=1)
    assert len(nvml.asked) == 3, "another process is another question"


def test_what_nvml_does_not_know_is_unknown(nvml, clock, monkeypatch):
    hidden = Device("GPU-2", "GPU-2")
    assert Gauge().read([(hidden, 42)], cpu_threads=1) == [Usage()]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gauge().read([(CARD, 42)], cpu_threads=1) == [Usage(total_bytes=80 << 30)]


def test_a_cpu_rank_is_looked_up_in_proc(clock, monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")
    worked = iter([1000.0, 1000.0 + ticks, 5.0])
    monkeypatch.setattr(usage, "process_ticks", lambda _: next(worked))
    gauge = Gauge()
    (first,) = gauge.read([(CPU, os.getpid())], cpu_threads=1)
    assert first.utilisation is None, "nothing is known at the first look"
    assert first.used_bytes > 1 << 20
    assert first.total_bytes > first.free_bytes > 0
    clock.s += 2.0
    (second,) = gauge.read([(CPU, os.getpid())], cpu_threads=2)
    assert second.utilisation == pytest.approx(0.25), "a second's work in two, on two threads"
    clock.s += 2.0
    (third,) = gauge.read([(CPU, os.getpid())], cpu_threads=2)
    assert third.utilisation is None, "the number belongs to another process now"


def test_a_process_that_ended_uses_nothing():
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert process_ticks(ended.pid) == 0
    assert resident_bytes(ended.pid) is None
    (found,) = Gauge().read([(CPU, None)], cpu_threads=1)
    assert (found.used_bytes, found.utilisation) == (None, None)
