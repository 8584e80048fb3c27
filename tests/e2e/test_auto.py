"""``XDIT_STRATEGY=auto`` measures the ranks against ComfyUI alone, takes the faster, remembers it.

Which of the two is faster is nothing that a shared machine can be asked to repeat, but for one
case: two ranks on one core are no faster than one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare_all
from rig.outputs import Pixels
from rig.server import Server, base_directory
from rig.trees import Tree

from comfy_xdit_patch.host.pace.auto import ONE_IS_FASTER
from comfy_xdit_patch.planning.verdict import NUM_TIMED

pytestmark = [pytest.mark.slow, pytest.mark.newest_only]

STEPS = 10
DEADLINE_S = 300.0
NUM_MEASURED = NUM_TIMED + 1
NUM_DOUBTED = 2 * NUM_TIMED + 1  # on the ranks, where ComfyUI alone is faster
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


def test_two_ranks_on_one_core_are_measured_and_not_taken(
    servers: Callable[..., Server], tree: Tree, tmp_path: Path
) -> None:
    stock = servers(tree, XDIT_STRATEGY="off")
    expected = [image(stock, seed) for seed in range(3)]
    models = (stock.base_dir / "models").resolve()
    with (
        base_directory(tmp_path / "comfyui", models) as base,
        Server(tree, base, env=ENV) as ranks,
    ):
        _keep_on_one_core(ranks)
        assert compare_all(expected[0], image(ranks, 0)).is_equal
        first = last_run(ranks)
        assert first["steps_parallel"] == NUM_DOUBTED
        assert first["steps_measured"] == NUM_MEASURED
        rest = STEPS - NUM_DOUBTED - NUM_MEASURED
        assert first["fall_back_reasons"] == {ONE_IS_FASTER.reason: rest}
        assert "ComfyUI alone is faster for this model" in ranks.log_text()
        assert compare_all(expected[1], image(ranks, 1)).is_equal
        assert last_run(ranks)["fall_back_reasons"] == {ONE_IS_FASTER.reason: STEPS}
        forwards = [rank["forwards"] for rank in ranks.status()["ranks"]]
        assert forwards == [NUM_DOUBTED] * 2
        # Who begins anew knows it from the file, and asks nothing of the workers.
        ranks.have(ENV | {"XDIT_START_TIMEOUT": "401"})
        assert compare_all(expected[2], image(ranks, 2)).is_equal
        assert last_run(ranks)["fall_back_reasons"] == {ONE_IS_FASTER.reason: STEPS}


@pytest.mark.thorough
def test_what_is_measured_is_what_is_taken(tree: Tree, tmp_path: Path) -> None:
    models = models_directory(Sizes(hidden=512))
    with (
        base_directory(tmp_path / "comfyui", models) as base,
        Server(tree, base, env=ENV) as ranks,
    ):
        image(ranks, 0)
        first = last_run(ranks)
        assert first["steps_measured"] == NUM_MEASURED
        image(ranks, 1)
        second = last_run(ranks)
        if "the ranks are faster for this model and size" in ranks.log_text():
            assert first["steps_parallel"] == STEPS - NUM_MEASURED
            if second["steps_measured"]:
                return  # Something else took the cores meanwhile, and they are measured again.
            assert second["steps_parallel"] == STEPS
            assert second["speedup"] > 0
            assert "x of ComfyUI alone as measured here" in ranks.log_text()
        else:
            rest = STEPS - NUM_DOUBTED - NUM_MEASURED
            assert first["fall_back_reasons"] == {ONE_IS_FASTER.reason: rest}
            assert second["fall_back_reasons"] == {ONE_IS_FASTER.reason: STEPS}
