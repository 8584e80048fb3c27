"""The workers measure the machine, and the planner predicts from it what a call takes here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inside.client import Inside
from rig.trees import Tree

from comfy_xdit_patch.patching.measuring import RATES
from comfy_xdit_patch.planning.link_timing import measurements, name_of

# One after the other, whatever their number of ranks: all were started at once.
pytestmark = pytest.mark.group("2")

Record = Callable[[str, object], None]

DEADLINE_S = 240.0
SIZES = {"height": 32, "width": 32, "batch": 1, "text_tokens": 64}
CALLS = 5
FACTOR = 10.0
"""At most, between prediction and measurement, on a machine on which other tests run."""


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


@pytest.mark.newest_only
def test_the_machine_is_measured_in_comfyui_and_its_predictions_are_near(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    record_property: Record,
) -> None:
    ranks = inside(tree, XDIT_GPUS="cpu:2")
    status = ranks.call("measuring:measure")
    machine = status["machine"]
    assert machine["not_measured"] is None
    assert len(machine["ranks"]) == 2
    assert [link["ranks"] for link in machine["links"]] == [[0, 1]]
    assert status["measuring_s"][1] < status["measuring_s"][0] / 10, "asked for once"
    record_property("machine", json.dumps(machine))

    path = flux_dev(hidden=512)
    found = ranks.call("measuring:predicted_and_measured", path=path, calls=CALLS, **SIZES)
    record_property("predicted and measured", json.dumps(found))
    for plan, seconds in found["measured"].items():
        assert seconds / FACTOR < found["predicted"][plan] < seconds * FACTOR, plan
