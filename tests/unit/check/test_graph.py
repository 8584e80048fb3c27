"""What a prompt's history says of a case's graph."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.check.graph import finished, graph, latent_file, seconds_per_step
from comfy_xdit_patch.check.nodes_pack import NODE_CLASS_MAPPINGS, TIMES_S, XditCheckTimes
from comfy_xdit_patch.errors import CheckError


def test_its_own_nodes_are_in_the_pack_with_these_inputs():
    for node in graph(size_px=64, num_steps=2, seed=1).values():
        if node["class_type"].startswith("Xdit"):
            known = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()["required"]
            assert set(node["inputs"]) == set(known)


def test_a_step_is_timed_from_the_first_to_the_last():
    history = {"outputs": {"times": {"times_s": [10.0, 10.5, 11.2]}}}
    assert seconds_per_step(history) == pytest.approx(0.6)


def test_the_clock_is_read_once():
    TIMES_S.extend([1.0, 2.0])
    assert XditCheckTimes().read(samples=None) == {"ui": {"times_s": [1.0, 2.0]}}
    assert XditCheckTimes().read(samples=None) == {"ui": {"times_s": []}}


def test_the_latent_lies_in_the_base_directory(tmp_path):
    file = {"filename": "a.latent", "subfolder": "b", "type": "output"}
    history = {"outputs": {"save": {"latents": [file]}}}
    assert latent_file(history, tmp_path) == tmp_path / "output" / "b" / "a.latent"


def test_a_node_that_failed_is_quoted():
    message = {"node_type": "KSampler", "exception_type": "X", "exception_message": "no room"}
    entry = {"status": {"status_str": "error", "messages": [["execution_error", message]]}}
    with pytest.raises(CheckError, match="Node KSampler failed: X: no room"):
        finished(entry)
    with pytest.raises(CheckError, match="did not succeed"):
        finished({"status": {"status_str": "error", "messages": []}})
    assert finished({"status": {"status_str": "success"}})
