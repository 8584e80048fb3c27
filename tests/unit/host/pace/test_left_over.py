"""What others take of cores and cards, from /proc of real processes and a stand-in for NVML."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types

import pytest

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pace import rank_speeds as left_over
from comfy_xdit_patch.host.pace.rank_speeds import LEAST, LeftOver, core_ticks, time_taken

OWN = 4242


def namespace(**values):
    return types.SimpleNamespace(**values)


class Crew:
    """A crew whose ranks are processes of the test."""

    def __init__(self, pids, device):
        self.workers = [namespace(process=namespace(pid=pid), device=device) for pid in pids]
        self.joined = {rank: namespace(total_bytes=100, free_bytes=60) for rank in range(len(pids))}
        self.world_size = len(pids)


def test_a_core_that_works_counts_its_ticks():
    before = core_ticks()
    assert set(before) >= os.sched_getaffinity(0)
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    assert sum(core_ticks().values()) >= sum(before.values()) + 10


@pytest.fixture
def spinning():
    """A process that keeps one core of ours busy."""
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_programs_work_is_what_it_leaves_less_of(spinning):
    core = min(os.sched_getaffinity(0))
    sleeping = subprocess.Popen(["sleep", "60"])
    try:
        os.sched_setaffinity(sleeping.pid, {core})
        found = LeftOver(Crew([sleeping.pid], Device("cpu")))
        assert found.parts() == (1.0,), "nothing is known at the first look"
        time.sleep(1.0)
        assert found.parts() == (pytest.approx(LEAST, abs=0.2),)
    finally:
        sleeping.kill()
        sleeping.wait()


def test_a_ranks_own_work_is_not_anothers(monkeypatch):
    ticks = iter([{0: 0.0, 1: 0.0}, {0: 100.0, 1: 100.0}])
    host = os.getpid()
    own = iter([0.0, 0.0, 0.0, 80.0, 0.0, 40.0])  # the two ranks, and the host on both cores
    now = iter([10.0, 11.0])
    monkeypatch.setattr(left_over, "core_ticks", lambda: next(ticks))
    monkeypatch.setattr(left_over, "process_ticks", lambda _: next(own))
    cores = {0: {0}, 1: {1}, host: {0, 1}}
    monkeypatch.setattr(left_over.os, "sched_getaffinity", cores.get)
    monkeypatch.setattr(left_over.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(left_over.time, "monotonic", lambda: next(now))
    found = LeftOver(Crew([0, 1], Device("cpu")))
    found.parts()
    assert found.parts() == (1.0, LEAST), "the second core is all another's"


def test_a_rank_that_is_gone_changes_nothing():
    ended = subprocess.Popen(["true"])
    ended.wait()
    found = LeftOver(Crew([ended.pid], Device("cpu")))
    assert found.parts() == found.parts() == (1.0,)


class NVMLError(Exception):
    pass


def nvml(monkeypatch, *, utilization=80, samples=(), error=None):
    def of_processes(handle, since_us):
        if error is not None:
            raise error
        return [namespace(pid=pid, timeStamp=at, smUtil=part) for pid, at, part in samples]

    stand_in = types.ModuleType("pynvml")
    stand_in.NVMLError = NVMLError
    stand_in.nvmlInit = lambda: None
    stand_in.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    stand_in.nvmlDeviceGetUtilizationRates = lambda _: namespace(gpu=utilization)
    stand_in.nvmlDeviceGetProcessUtilization = of_processes
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)


def test_the_latest_sample_of_every_process_but_our_own_is_summed(monkeypatch):
    samples = [(OWN, 1, 90), (7, 1, 50), (7, 2, 20), (8, 1, 15)]
    nvml(monkeypatch, samples=samples)
    assert time_taken("GPU-1", {OWN}) == pytest.approx(0.35)


def test_an_idle_card_has_no_samples(monkeypatch):
    nvml(monkeypatch, utilization=0, error=NVMLError("not found"))
    assert time_taken("GPU-1", {OWN}) == 0


def test_without_nvml_the_memory_that_others_held_counts_but_not_the_hosts(monkeypatch):
    nvml(monkeypatch, error=NVMLError("not supported"))
    assert time_taken("GPU-1", {OWN}) is None
    found = LeftOver(Crew([1, 2], Device("H100", uuid="GPU-1")))
    assert found.parts() == (1.0, pytest.approx(0.6))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert time_taken("GPU-1", {OWN}) is None
