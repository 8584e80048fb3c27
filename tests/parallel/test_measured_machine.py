"""The workers measure the machine, and what is slow in it is what the planner leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inside.client import Inside
from probe_ranks import DELAY_S
from rig.trees import Tree

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pace.auto import _best
from comfy_xdit_patch.host.pace.machine import RATES, Measuring
from comfy_xdit_patch.planning.cost.asked import parse_asked
from comfy_xdit_patch.planning.cost.cost import predict
from comfy_xdit_patch.planning.cost.job import Job
from comfy_xdit_patch.planning.cost.known_models import FLUX1_DEV
from comfy_xdit_patch.planning.cost.link_timing import measurements, name_of
from comfy_xdit_patch.planning.cost.machine import Machine
from comfy_xdit_patch.planning.cost.model_shape import FLOAT32
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.wire.messages.codec import decode
from comfy_xdit_patch.wire.messages.replies import Joined

# One after the other, whatever their number of ranks: all were started at once.
pytestmark = pytest.mark.group("2")

Record = Callable[[str, object], None]

DEADLINE_S = 240.0
# Two blocks of a size at which an exchange of Ulysses sends about 256 KiB, as much as is timed.
TINY = dataclasses.replace(FLUX1_DEV, width=512, num_double_blocks=1, num_single_blocks=1)
JOB = Job(TINY, Workload(1, 64, 192, num_heads=4), FLOAT32, num_steps=20)
USUAL = ParallelPlan(2, 1, 2)


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What 2, 3 and 4 ranks found, by their number."""
    folder: Path = tmp_path_factory.mktemp("probe")
    command = [sys.executable, str(Path(__file__).with_name("probe_ranks.py")), str(folder)]
    done = subprocess.run(
        [*command, "2", "3", "4"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        size: [json.loads((folder / f"{size}.{rank}.json").read_text()) for rank in range(size)]
        for size in (2, 3, 4)
    }


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_rank_measures_itself_and_all_exchanges(
    replies: dict[int, list[dict[str, Any]]], num_ranks: int, record_property: Record
) -> None:
    for rank, found in enumerate(replies[num_ranks]):
        reply = found["reply"]
        assert reply["type"] == "Probed"
        assert set(reply["together"]) == RATES
        assert set(reply["alone"]) == (RATES if rank == 0 else set())
        assert set(reply["exchanges"]) == {name_of(*m) for m in measurements(num_ranks)}
        for points in reply["exchanges"].values():
            assert len(points) >= 2
            assert all(num_bytes > 0 and seconds > 0 for num_bytes, seconds in points)
    record_property("seconds", max(found["reply"]["seconds"] for found in replies[num_ranks]))
    record_property("first exchange, seconds", max(f["exchange_s"] for f in replies[num_ranks]))


def test_a_number_that_arrives_as_another_is_found(
    replies: dict[int, list[dict[str, Any]]],
) -> None:
    assert replies[2][1]["disturbed"] == (
        "1 of 256 numbers from rank 0 arrived as others than were sent."
    )


def machine_of(ranks: list[dict[str, Any]], name: str) -> Machine:
    """What the host makes of the replies of two ranks."""
    replies = [decode(json.dumps(found[name]).encode()) for found in ranks]

    crew: Any = types.SimpleNamespace(
        joined=[Joined(rank, 1, "cpu", {}, 0, 0, 0) for rank in range(len(replies))],
        turn=lambda poll: contextlib.nullcontext(turn),
    )
    turn = types.SimpleNamespace(number=1, ask=lambda message: replies)
    pool: Any = types.SimpleNamespace(
        devices=[Device("cpu")] * len(replies),
        world_size=len(replies),
        no_peer_to_peer=None,
        wait_until_ready=lambda poll: crew,
    )
    machine = Measuring(pool, budget_bytes=None).machine(lambda: None)
    assert machine is not None
    return machine


def communication_s(plan: str, machine: Machine) -> float:
    candidate = parse_asked(plan).plan
    assert candidate is not None
    return predict(candidate, JOB, machine).communication_s


def test_where_all_to_all_is_slow_auto_takes_the_ring(
    replies: dict[int, list[dict[str, Any]]],
) -> None:
    machine = machine_of(replies[2], "all_to_all")
    of_exchanges = 2 * TINY.num_blocks * DELAY_S
    assert 0.95 * of_exchanges < communication_s("ulysses=2", machine) < 2 * of_exchanges
    assert communication_s("ring=2", machine) < of_exchanges / 2
    assert str(_best(JOB, machine, USUAL)) == "ring=2"


def test_where_a_ring_is_slow_auto_leaves_ulysses(
    replies: dict[int, list[dict[str, Any]]],
) -> None:
    machine = machine_of(replies[2], "pass_on_async")
    of_steps = TINY.num_blocks * DELAY_S
    assert 0.95 * of_steps < communication_s("ring=2", machine) < 4 * of_steps
    assert communication_s("ulysses=2", machine) < of_steps / 2
    assert _best(JOB, machine, USUAL) is None
    assert str(_best(JOB, machine, ParallelPlan(2, 1, 1, 2))) == "ulysses=2"


@pytest.mark.newest_only
def test_the_machine_is_measured_once_in_comfyui(
    tree: Tree, inside: Callable[..., Inside], record_property: Record
) -> None:
    ranks = inside(tree, XDIT_GPUS="cpu:2")
    status = ranks.call("measuring:measure")
    machine = status["machine"]
    assert machine["not_measured"] is None
    assert len(machine["ranks"]) == 2
    assert [link["ranks"] for link in machine["links"]] == [[0, 1]]
    assert status["measuring_s"][1] < status["measuring_s"][0] / 10, "asked for once"
    record_property("machine", json.dumps(machine))
