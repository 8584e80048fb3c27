"""What ranks say that they measured becomes a machine, or a reason, or lost workers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pace.machine import RATES, REFERENCE_CALL_S, Measuring
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.inheritance import HostState
from comfy_xdit_patch.host.pool.launcher import Worker
from comfy_xdit_patch.host.pool.pool import Pool, PoolState
from comfy_xdit_patch.host.pool.start import Started
from comfy_xdit_patch.planning.cost.link_timing import measurements, name_of
from comfy_xdit_patch.planning.cost.machine import HOST_CALL_S
from comfy_xdit_patch.report.doctor_sections import measured_lines
from comfy_xdit_patch.settings import read_settings
from comfy_xdit_patch.wire.channel import Channel, frame_of
from comfy_xdit_patch.wire.messages.replies import Failed, Joined, NotProbed, Probed

SETTINGS = read_settings({"XDIT_GPUS": "cpu:2", "XDIT_STEP_TIMEOUT": "5"})
SIZES = (1 << 14, 1 << 18, 1 << 21)
GB = 1e9


class Process:
    """A process that is alive until it is killed."""

    pid = 1
    code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9

    def wait(self, timeout: float | None = None) -> int | None:
        return self.code


class Quiet(Worker):
    """A worker without a log."""

    def log_tail(self) -> str:
        return ""


class World:
    """A real pool whose workers are sockets on which their replies lie already."""

    def __init__(self, *replies: Any, device: Device | None = None) -> None:
        device = device or Device("cpu")
        self.pool = Pool(
            devices=[device] * len(replies),
            host_state=HostState("/", [], [], False, {}),
            settings=SETTINGS,
        )
        self.theirs = []
        workers = []
        joined = {}
        for rank, reply in enumerate(replies):
            ours, theirs = socket.socketpair()
            theirs.sendall(frame_of(reply))
            self.theirs.append(theirs)
            worker: Any = Quiet(rank, device, Process(), Channel(ours), Path("/nowhere"))  # type: ignore[arg-type]
            workers.append(worker)
            joined[rank] = Joined(rank, 1, "x", {}, 24 << 30, 22 << 30, 0)
        self.workers = workers
        started = Started(tuple(workers), joined, 0.0)
        self.pool.crew = Crew(started, step_timeout_s=5.0, lose=self.pool._lose)
        self.pool.state = PoolState.READY
        self.measuring = Measuring(self.pool, budget_bytes=None)

    def measure(self) -> Any:
        return self.measuring.machine(lambda: None)

    def close(self) -> None:
        for theirs in self.theirs:
            theirs.close()
        for worker in self.workers:
            worker.channel.close()


@pytest.fixture
def world():
    """``world(reply of rank 0, reply of rank 1...)``."""
    made = []

    def make(*replies, **kwargs):
        made.append(World(*replies, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def probed(rank: int, num_ranks: int = 2, *, speed: float = 1.0, slow: float = 1.0) -> Probed:
    """A rank that computes so many times as fast, on links that take so many times as long."""
    rates = {
        "linear_flops": 5e10 * speed,
        "linear_rows": 512.0,
        "attention_flops": 3e10 * speed,
        "copy_bytes_per_s": 1e10 * speed,
        "host_bytes_per_s": 9e9,
        "call_s": 2 * REFERENCE_CALL_S / speed,
    }
    points = [[float(b), slow * (1e-4 + b / (1 * GB))] for b in SIZES]
    return Probed(
        request=1,
        together=rates,
        alone={**rates, "linear_flops": 2 * rates["linear_flops"]} if rank == 0 else {},
        exchanges={name_of(*m): points for m in measurements(num_ranks)},
        seconds=0.9,
    )


def test_rates_become_gpus_and_times_become_links(world):
    machine = world(probed(0), probed(1, speed=0.5, slow=2.0)).measure()
    first, second = machine.gpus
    assert first.linear_flops == pytest.approx(5e10 * (512 + 72) / 512), "of large matrices"
    assert second.linear_flops == pytest.approx(first.linear_flops / 2)
    assert (first.attention_flops, first.memory_bytes_per_s) == (3e10, 1e10)
    assert machine.alone.linear_flops == pytest.approx(2 * first.linear_flops)
    link = machine.links[0][1]
    assert link.kind == "host"
    assert link.all_to_all_bytes_per_s == pytest.approx(0.5 * GB), "as the slower rank has it"
    assert link.latency_s == pytest.approx(2e-4)
    assert machine.are_links_timed
    assert machine.host_call_s == pytest.approx(4 * HOST_CALL_S), "of the slowest rank"


def test_a_machine_is_measured_once_for_a_crew(world):
    made = world(probed(0), probed(1))
    machine = made.measure()
    assert made.measure() is machine, "a second request would have no reply"
    made.pool.crew = None
    assert made.measuring.status()["ranks"] == [], "nothing is known of new workers"


def test_a_card_of_the_table_has_its_fp8_in_proportion(world, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    card = Device("NVIDIA GeForce RTX 4090", "GPU-1", 24 << 30)
    machine = world(probed(0), probed(1), device=card).measure()
    assert machine.gpus[0].fp8_flops / machine.gpus[0].linear_flops == pytest.approx(325 / 150)
    assert machine.gpus[0].memory_bytes == 24 << 30
    assert machine.gpus[1].memory_bytes == 22 << 30, "what is free where ComfyUI is not"
    assert machine.links[0][1].kind == "pcie"


def test_without_peer_to_peer_all_links_are_through_cpu_memory(world, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    made = world(probed(0), probed(1), device=Device("NVIDIA H100", "GPU-1", 80 << 30))
    made.pool._starter.no_peer_to_peer = "Rank 1 hangs"
    assert made.measure().links[0][1].kind == "host"
    assert made.measuring.status()["peer_to_peer_disabled"] == "Rank 1 hangs"


def test_a_rank_that_cannot_measure_leaves_the_workers_and_a_reason(world, caplog):
    caplog.set_level(logging.INFO)
    made = world(NotProbed(1, "another rank could not"), NotProbed(1, "OutOfMemoryError: no"))
    assert made.measure() is None
    assert made.measure() is None
    assert made.pool.state is PoolState.READY
    reason = "rank 0: another rank could not; rank 1: OutOfMemoryError: no"
    assert made.measuring.status()["not_measured"] == reason
    assert [r.getMessage() for r in caplog.records] == [
        f"xDiT: the machine is not measured: {reason}"
    ]


def test_a_rank_that_is_lost_in_it_is_lost_as_in_any_request(world):
    made = world(probed(0), Failed(1, "measuring the machine", "RuntimeError: x", ""))
    with pytest.raises(WorkerError, match=r"Rank 1 \(cpu\) failed in measuring the machine"):
        made.measure()
    assert made.pool.state is PoolState.BROKEN


@pytest.mark.parametrize(
    "change",
    [
        {"together": dict.fromkeys(sorted(RATES), 0.0)},
        {"together": {}},
        {"together": dict.fromkeys(sorted(RATES), -1.0)},
        {"alone": dict.fromkeys(sorted(RATES), 1e300)},
        {"exchanges": {}},
        {"exchanges": {name_of(*m): [] for m in measurements(2)}},
        {"exchanges": {name_of(*m): [[1.0]] for m in measurements(2)}},
        {"exchanges": {name_of(*m): [[1.0, 0.0]] for m in measurements(2)}},
        {"exchanges": {name_of(*m): [[1.0, 2.0]] * 3 for m in measurements(2)}},
        {"exchanges": {name_of(*m): [[1.0, 2.0]] * 99 for m in measurements(2)}},
        {"exchanges": {name_of(*m): [[1.0, 2.0]] for m in measurements(3)}},
        {"seconds": 0.0},
    ],
    ids=str,
)
def test_measurements_that_cannot_be_lose_the_workers_and_nothing_else(world, change):
    made = world(probed(0), dataclasses.replace(probed(1), **change))
    with pytest.raises(WorkerError, match=r"Rank \d has measured what cannot be\."):
        made.measure()
    assert made.pool.state is PoolState.BROKEN


def test_an_interrupt_leaves_it_to_be_measured_next_time(world):
    made = world(probed(0), probed(1))

    def interrupt() -> None:
        raise InterruptedError

    with contextlib.suppress(InterruptedError):
        made.measuring.machine(interrupt)
    assert made.pool.state is PoolState.READY
    assert made.measuring.status()["ranks"] == []


def test_the_status_is_plain_numbers_and_the_doctor_prints_them(world):
    made = world(probed(0), probed(1))
    assert json.loads(json.dumps(made.measuring.status()))["ranks"] == []
    made.measure()
    status = json.loads(json.dumps(made.measuring.status()))
    assert set(status) == {
        "peer_to_peer_disabled",
        "not_measured",
        "measured_in_s",
        "host_call_s",
        "ranks",
        "rank_0_alone",
        "links",
    }
    lines = measured_lines(status)
    assert "machine measured in 0.9 s:" in lines
    assert any("rank 1: linears 0.057 TFLOP/s, attention 0.03 TFLOP/s" in x for x in lines)
    assert any("rank 0 alone: linears 0.114 TFLOP/s" in x for x in lines)
    assert any(
        "ranks 0-1 (host): all-to-all 1 GB/s, ring 1 GB/s, latency 100 us" in x for x in lines
    )


def test_the_doctor_says_why_peer_to_peer_is_off():
    lines = measured_lines(
        {"peer_to_peer_disabled": "Rank 1 hangs\nand more", "not_measured": "no memory"}
    )
    assert lines == [
        "peer-to-peer is switched off, because with it: Rank 1 hangs",
        "the machine is not measured: no memory",
    ]
    assert measured_lines(None) == []
