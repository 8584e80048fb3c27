"""``XDIT_STRATEGY`` as users set it: a name, and a plan; the image is stock's under both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig import graphs, weight_rows
from rig.compare import compare_all
from rig.environment import RigError
from rig.pair import STRICT, run, run_pair, run_stock
from rig.server import Server
from rig.trees import Tree

Servers = Callable[..., Server]

# Of an image of random weights, whose keys move faster than those of a trained model.
MIN_APPROXIMATE_DB = 25.0


@pytest.mark.newest_only
def test_a_plan_is_followed_or_refused_with_its_reason(servers: Servers, tree: Tree) -> None:
    env = {"XDIT_STRATEGY": "ring=1,cfg=2", "XDIT_STRICT": "0"}
    base = graphs.with_values(
        graphs.load("ksampler_dev"), seed=21, size=(128, 128), steps=2, save_latent=True
    )
    two_rows = graphs.with_values(base, cfg=3.0, negative="blurry")
    pair = run_pair(servers, tree, two_rows, 2, env=env)
    assert pair.run["plan"] == "batch=2"
    before, after = (s["totals"]["bytes_between_ranks"] for s in (pair.before, pair.after))
    assert after == before, "rows need no exchange"

    ranks = servers(tree, XDIT_GPUS="cpu:2", **{**STRICT, **env})
    run(ranks, base)  # one row
    reason = "XDIT_STRATEGY wants the batch in 2 parts, and this one has fewer rows"
    assert ranks.status()["last_run"]["fall_back_reasons"] == {reason: 2}
    assert f"running on one GPU as ComfyUI does: {reason}" in ranks.log_text()


@pytest.mark.newest_only
def test_pipefusion_by_name_says_that_it_is_approximate_and_is_close(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    graph = graphs.with_values(
        graphs.load("ksampler_dev"), seed=21, size=(128, 128), steps=8, save_latent=True
    )
    expected = run_stock(servers(tree, XDIT_STRATEGY="off"), graph)
    env = {**STRICT, "XDIT_STRATEGY": "pipefusion", "XDIT_STRICT": "0"}
    ranks = servers(tree, XDIT_GPUS="cpu:2", **env)
    found = run(ranks, graph)
    difference = compare_all(expected.images, found.images)
    record_property("difference", str(difference))
    assert MIN_APPROXIMATE_DB < difference.psnr_db < 70.0, "close, and an approximation"
    report = ranks.status()["last_run"]
    assert (report["steps_parallel"], report["steps_warm_up"]) == (8, 1)
    assert (report["plan"], report["is_exact"]) == ("pipefusion=2", False)
    assert "8 steps on 2 CPU ranks (pipefusion=2, approximate)" in ranks.log_text()

    few = graphs.with_values(graph, steps=4)
    assert run(ranks, few).images[0].shape == expected.images[0].shape
    reason = "PipeFusion needs 5 steps or more"
    assert ranks.status()["last_run"]["fall_back_reasons"] == {reason: 4}


@pytest.mark.newest_only
def test_weights_are_patched_before_they_are_cut(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    env = {"XDIT_STRATEGY": "tensor"}
    for name in ("LoRA, kohya", "fp8_e4m3fn + LoRA", "scaled fp8 + LoRA", "mixed fp8"):
        graph = weight_rows.ROWS[name].graph(weight_rows.base_graph())
        pair = run_pair(servers, tree, graph, 2, env=env, **weight_rows.SETUP)
        verified = (
            pair.after["totals"]["weights_verified"] - pair.before["totals"]["weights_verified"]
        )
        record_property(name, f"{pair.difference}, {pair.latent_error}, {verified} verified")
        assert pair.run["plan"] == "tensor=2"
        assert verified > 0
    ranks = servers(tree, XDIT_GPUS="cpu:2", **STRICT, **env, **weight_rows.SETUP)
    for name in ("int8", "GGUF Q8_0"):
        if not weight_rows.ROWS[name].runs_on(tree):
            continue
        with pytest.raises(RigError, match="these are quantised in groups"):
            run(ranks, weight_rows.ROWS[name].graph(weight_rows.base_graph()))
