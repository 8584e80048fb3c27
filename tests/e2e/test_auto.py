"""``XDIT_STRATEGY=auto`` times plans and ComfyUI alone in turn, takes the fastest, remembers it.

Which of them is the fastest is nothing that a shared machine can be asked to repeat, but for one
case: two ranks on one core are no faster than one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare_all
from rig.judgement import wrong_of
from rig.outputs import Pixels
from rig.server import Server, base_directory
from rig.trees import Tree

from comfy_xdit_patch.planning.verdict import FEWEST, MOST, NUM_RUNS, ONE

pytestmark = [pytest.mark.slow, pytest.mark.newest_only]

WAYS = {"ulysses=2", "ring=2", ONE}
LEAST_OF_EACH, MOST_OF_EACH = 1 + FEWEST, 1 + MOST
STEPS = len(WAYS) * MOST_OF_EACH + 1
"""A trial is over within one image."""
DEADLINE_S = 300.0
ENV = {"XDIT_GPUS": "cpu:2", "XDIT_STRATEGY": "auto", "XDIT_START_TIMEOUT": "400"}


def image(server: Server, seed: int) -> list[Pixels]:
    graph = graphs.with_values(
        graphs.load("ksampler_dev"), seed=seed, size=(192, 192), steps=STEPS, save_latent=True
    )
    return server.images(server.run(graph, DEADLINE_S))


def _keep_on_one_core(server: Server) -> None:
    """Its ranks start with the first prompt, and inherit this."""
    assert server.process is not None
    for thread in os.listdir(f"/proc/{server.process.pid}/task"):
        os.sched_setaffinity(int(thread), {0})


def last_run(server: Server) -> dict[str, Any]:
    return server.status()["last_run"]  # type: ignore[no-any-return]


def verdict_of(file: Path) -> dict[str, Any]:
    """The only one that is kept."""
    (verdict,) = json.loads(file.read_text())["verdicts"].values()
    return verdict  # type: ignore[no-any-return]


def _grow_old(file: Path) -> None:
    """Have the verdicts for ComfyUI alone be in doubt."""
    body = json.loads(file.read_text())
    for verdict in body["verdicts"].values():
        verdict["num_runs"] = NUM_RUNS
    file.write_text(json.dumps(body))


def assert_measured(run: dict[str, Any]) -> None:
    """A whole trial was made, and nothing but that and what follows from it."""
    assert LEAST_OF_EACH <= run["steps_measured"] <= MOST_OF_EACH
    assert run["steps_parallel"] >= 2 * LEAST_OF_EACH
    assert run["fall_back_reasons"] == {}
    assert run["steps"] == STEPS


def test_two_ranks_on_one_core_are_measured_and_not_taken(
    servers: Callable[..., Server], tree: Tree, tmp_path: Path
) -> None:
    stock = servers(tree, XDIT_STRATEGY="off")
    expected = [image(stock, seed) for seed in range(5)]
    models = (stock.base_dir / "models").resolve()
    with (
        base_directory(tmp_path / "comfyui", models) as base,
        Server(tree, base, env=ENV) as ranks,
    ):
        file = base / "cache" / "comfy-xdit-patch" / "verdicts.json"
        _keep_on_one_core(ranks)
        assert compare_all(expected[0], image(ranks, 0)).is_equal
        first = last_run(ranks)
        assert_measured(first)
        assert "ComfyUI alone is the fastest for this model" in ranks.log_text()
        assert verdict_of(file)["paces"].keys() == WAYS
        assert compare_all(expected[1], image(ranks, 1)).is_equal
        assert last_run(ranks)["steps_chose_one_gpu"] == STEPS
        forwards = [rank["forwards"] for rank in ranks.status()["ranks"]]
        assert forwards == [first["steps_parallel"]] * 2
        # Who begins anew knows it from the file, and asks nothing of the workers.
        ranks.have(ENV | {"XDIT_START_TIMEOUT": "401"})
        assert compare_all(expected[2], image(ranks, 2)).is_equal
        assert last_run(ranks)["steps_chose_one_gpu"] == STEPS
        assert verdict_of(file)["num_runs"] == 2
        num_chosen = first["steps_chose_one_gpu"] + 2 * STEPS
        said = f"{num_chosen} steps on one GPU, which auto had found to be the faster"
        assert wrong_of(ranks, said, "x of ComfyUI alone, measured 0.0 h ago") == []
        (verdict,) = ranks.status()["verdicts"]
        assert (verdict["taken"], verdict["paces"].keys()) == (ONE, WAYS)
        # After many runs it is looked at again.
        _grow_old(file)
        ranks.have(ENV | {"XDIT_START_TIMEOUT": "402"})
        assert compare_all(expected[3], image(ranks, 3)).is_equal
        assert_measured(last_run(ranks))
        assert verdict_of(file)["num_runs"] == 0
        # Nor does it know anything once it was told to forget it.
        ranks.request("/xdit/measure", {})
        assert compare_all(expected[4], image(ranks, 4)).is_equal
        assert_measured(last_run(ranks))


@pytest.mark.thorough
def test_what_is_measured_is_what_is_taken(tree: Tree, tmp_path: Path) -> None:
    models = models_directory(Sizes(hidden=512))
    with (
        base_directory(tmp_path / "comfyui", models) as base,
        Server(tree, base, env=ENV) as ranks,
    ):
        file = base / "cache" / "comfy-xdit-patch" / "verdicts.json"
        image(ranks, 0)
        assert_measured(last_run(ranks))
        fastest_s = {way: pace["fastest_s"] for way, pace in verdict_of(file)["paces"].items()}
        taken = min(fastest_s, key=fastest_s.__getitem__)
        image(ranks, 1)
        second = last_run(ranks)
        if taken == ONE:
            assert second["steps_chose_one_gpu"] == STEPS
            return
        if second["steps_measured"]:
            return  # Something else took the cores meanwhile, and they are measured again.
        assert f"{taken} is the fastest for this model and size" in ranks.log_text()
        assert (second["steps_parallel"], second["plan"]) == (STEPS, taken)
        assert second["speedup"] > 0
        assert "x of ComfyUI alone as measured here" in ranks.log_text()


BUDGET_GIB = 2.3
"""Less than the model and all that is beside it take whole, and enough for half of it."""


@pytest.mark.thorough
def test_weights_that_do_not_fit_whole_are_tried_in_parts(tree: Tree, tmp_path: Path) -> None:
    models = models_directory(Sizes(hidden=1024, single=6))
    with (
        base_directory(tmp_path / "comfyui", models) as base,
        Server(tree, base, env=ENV | {"XDIT_GPU_MEMORY": str(BUDGET_GIB)}) as ranks,
    ):
        file = base / "cache" / "comfy-xdit-patch" / "verdicts.json"
        image(ranks, 0)
        assert_measured(last_run(ranks))
        assert verdict_of(file)["paces"].keys() == {"ulysses=2", "tensor=2", ONE}
