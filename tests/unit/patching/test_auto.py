"""Which plan of all ranks ``auto`` takes from a prediction, and when it leaves the usual one."""

from __future__ import annotations

import dataclasses

import pytest
from rig.published import machine_of, make_job

from comfy_xdit_patch.patching.auto import MARGIN, _best
from comfy_xdit_patch.planning.choice import Choice, choose
from comfy_xdit_patch.planning.plan import ParallelPlan


def usual(num_ranks, rows=1):
    return ParallelPlan(num_ranks, rows, num_ranks // rows)


@pytest.mark.parametrize("gpus", ["2xh100", "4xh100", "8xh100", "4xl20", "4x5090"])
def test_where_ulysses_is_the_fastest_or_nearly_so_it_stays(gpus):
    machine = machine_of(gpus)
    num_ranks = len(machine.gpus)
    found = _best(make_job(execution="compiled"), machine, usual(num_ranks))
    choice = choose(make_job(execution="compiled"), machine, world_size=num_ranks)
    assert isinstance(choice, Choice)
    seconds = {option.plan.name: option.time.total_s for option in choice.options}
    if found is None:
        exact = [s for name, s in seconds.items() if "fsdp" not in name and "offload" not in name]
        assert seconds[f"ulysses={num_ranks}"] * (1 - MARGIN) <= min(exact)
    else:
        assert seconds[str(found)] < seconds[f"ulysses={num_ranks}"] * (1 - MARGIN)


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
    machine = machine_of("2xl20")
    job = make_job(execution="compiled", rows=2)
    assert _best(job, machine, ParallelPlan(2, 2, 1)) is None


def test_an_usual_plan_that_is_not_predicted_stays():
    job = make_job(execution="compiled", rows=2)
    tiny = dataclasses.replace(job.workload, num_text_tokens=1, num_image_tokens=1)
    assert _best(dataclasses.replace(job, workload=tiny), machine_of("4xl20"), usual(4)) is None
