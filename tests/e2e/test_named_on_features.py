"""Strategies by name on graphs that are special: parallel, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig import feature_controls, feature_family, feature_packs, feature_sampling
from rig.feature_models import feature_models
from rig.feature_rows import FALLS_BACK, PARALLEL
from rig.feature_run import COMMON_PACKS, run_row
from rig.pair import STRICT
from rig.server import Server
from rig.trees import Tree

Servers = Callable[..., Server]

# Each of them takes another way to attention.
ROWS = {
    "FLUX.1 Redux, attention mask": feature_family.ROWS,
    "FLUX.2 klein, FluxKVCache": feature_family.ROWS,
    "NAGuidance": feature_sampling.ROWS,
    "ControlNet, reference latent": feature_controls.ROWS,
    "PuLID_Flux_ll (patches_replace)": feature_packs.ROWS,
}


@pytest.mark.newest_only
def test_a_ring_by_name(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    setup = {"models": feature_models(), "node_packs": COMMON_PACKS}
    stock = servers(tree, XDIT_STRATEGY="off", **setup)
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_STRATEGY="ring", **STRICT, **setup)
    for name, rows in ROWS.items():
        if not rows[name].runs_on(tree):
            continue
        found = run_row(stock, ranks, rows[name])
        record_property(name, str(found))
        assert found.outcome == rows[name].outcome, name
        assert not found.controls_alone
        status = ranks.status()
        assert status["last_run"]["plan"] == "ring=2"
        assert status["last_run"]["strategy"] == "ring"
        assert "(ring=2)" in ranks.log_text()


@pytest.mark.newest_only
def test_cut_blocks_by_name(
    servers: Servers, tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    setup = {"models": feature_models(), "node_packs": COMMON_PACKS}
    env = {**STRICT, "XDIT_STRICT": "0"}
    stock = servers(tree, XDIT_STRATEGY="off", **setup)
    ranks = servers(tree, XDIT_GPUS="cpu:2", XDIT_STRATEGY="tensor", **env, **setup)
    for name, (rows, reason) in CUT_ROWS.items():
        if not rows[name].runs_on(tree):
            continue
        found = run_row(stock, ranks, rows[name])
        record_property(name, f"{found}, latent {found.latent_error}")
        assert found.outcome == (FALLS_BACK if reason else PARALLEL), (name, found.reasons)
        assert all(reason in of_step for of_step in found.reasons), name
        assert not found.controls_alone
        assert bool(found.controls_parallel) == name.startswith("ControlNet")
        if not reason:
            assert ranks.status()["last_run"]["plan"] == "tensor=2"
    assert "(tensor=2)" in ranks.log_text()


# What runs on parts of the heads, and what would be wrong there.
CUT_ROWS = {
    "FLUX.1 dev": (feature_family.ROWS, ""),
    "FLUX.1 Redux, attention mask": (feature_family.ROWS, ""),
    "ControlNet, reference latent": (feature_controls.ROWS, ""),
    "SkipLayerGuidanceDiT": (feature_sampling.ROWS, ""),
    "NAGuidance": (feature_sampling.ROWS, "a node's patch may look at all of them"),
    "PuLID_Flux_ll (patches_replace)": (feature_packs.ROWS, "they cannot be run one by one: "),
}
