"""Which plan of all ranks ``auto`` takes from a prediction, and when it leaves the usual one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from rig.published import machine_of, make_job

from comfy_xdit_patch.host.pace import auto as patching_auto
from comfy_xdit_patch.host.pace.auto import MARGIN, Auto, Kind, _best
from comfy_xdit_patch.planning.cost.asked import parse_asked
from comfy_xdit_patch.planning.cost.cost import predict
from comfy_xdit_patch.planning.plan import ParallelPlan


def usual(num_ranks, rows=1):
    return ParallelPlan(num_ranks, rows, num_ranks // rows)


def part_of_ulysses(plan, gpus, px):
    """What a plan is predicted to take, by what Ulysses on all GPUs is predicted to take."""
    machine, job = machine_of(gpus), make_job(px=px, execution="compiled")
    seconds = [
        predict(parse_asked(name).plan, job, machine).total_s
        for name in (plan, f"ulysses={len(machine.gpus)}")
    ]
    return seconds[0] / seconds[1]


def taken(gpus, px):
    machine = machine_of(gpus)
    return _best(make_job(px=px, execution="compiled"), machine, usual(len(machine.gpus)))


@pytest.mark.parametrize(
    ("gpus", "px", "other"),
    [
        ("4xh100", 1024, "ulysses=2,ring=2"),
        ("8xh100", 1024, "ulysses=4,ring=2"),
        ("4xl20", 1024, "ulysses=2,ring=2"),
        ("4x5090", 1024, "ulysses=2,ring=2"),
    ],
)
def test_where_ulysses_is_the_fastest_it_stays(gpus, px, other):
    assert part_of_ulysses(other, gpus, px) > 1
    assert taken(gpus, px) is None


@pytest.mark.parametrize(
    ("gpus", "px", "other"),
    [
        ("2xh100", 1024, "ring=2"),
        ("2xl20", 2048, "ring=2"),  # 9.6 % less time
        ("4xl20", 2048, "ulysses=2,ring=2"),
    ],
)
def test_where_another_plan_is_a_little_faster_ulysses_stays(gpus, px, other):
    assert 1 - MARGIN < part_of_ulysses(other, gpus, px) < 0.99
    assert taken(gpus, px) is None


def test_where_a_ring_is_much_faster_it_is_taken():
    assert part_of_ulysses("ring=2", "2x4090", 2048) < 1 - MARGIN
    assert str(taken("2x4090", 2048)) == "ring=2"


def test_where_all_to_all_is_slow_a_plan_with_a_ring_is_taken():
    machine = machine_of("4xl20")
    slow = tuple(
        tuple(dataclasses.replace(link, all_to_all_bytes_per_s=1e9) for link in row)
        for row in machine.links
    )
    found = _best(
        make_job(execution="compiled"), dataclasses.replace(machine, links=slow), usual(4)
    )
    assert found is not None
    assert (found.batch, found.ulysses, found.ring) == (1, 1, 4)


def test_a_batch_that_can_be_shared_stays_shared():
    machine = machine_of("2x4090")
    job = make_job(px=2048, execution="compiled", rows=2)
    assert _best(job, machine, ParallelPlan(2, 2, 1)) is None
    assert str(_best(job, machine, usual(2))) == "batch=2"  # by far, and for that only


def test_an_usual_plan_that_is_not_predicted_stays():
    job = make_job(execution="compiled", rows=2)
    tiny = dataclasses.replace(job.workload, num_text_tokens=1, num_image_tokens=1)
    assert _best(dataclasses.replace(job, workload=tiny), machine_of("4xl20"), usual(4)) is None


def test_what_the_gpu_has_to_do_before_a_step_is_not_counted_for_it(monkeypatch):
    """5 s of it are left, and the step takes 2 s; launching takes no time."""
    now, queued = [0.0], [5.0]

    def synchronize(_):
        now[0] += queued.pop() if queued else 0

    def compute():
        queued.append(2.0)
        return "a step"

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(patching_auto.time, "perf_counter", lambda: now[0])
    took = []
    trial = SimpleNamespace(took=lambda seconds, *, is_several: took.append(seconds))
    auto = Auto.__new__(Auto)
    assert auto.time_one(Kind(None, trial), compute, torch.device("cuda:0")) == "a step"
    assert took == [2.0]
