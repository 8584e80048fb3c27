"""A rank stays on the cores beside its GPU."""

from __future__ import annotations

import os

import pytest

from comfy_xdit_patch.worker import affinity

PCI_ID = "0000:c1:00.0"


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0-3,8-9\n", {0, 1, 2, 3, 8, 9}), ("5", {5}), ("\n", set()), ("0-1,7\n", {0, 1, 7})],
)
def test_the_kernels_lists_of_cores_are_read(text, cores):
    assert affinity.cores_of(text) == cores


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """``kernel("0-7", {2, 3})``: cores beside the GPU, and those that this process may use."""
    kept = []

    def pretend(cpulist, allowed):
        (tmp_path / PCI_ID).mkdir()
        (tmp_path / PCI_ID / "local_cpulist").write_text(cpulist)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
        return kept

    monkeypatch.setattr(affinity, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: kept.append(cores))
    return pretend


@pytest.mark.parametrize(
    ("cpulist", "near"),
    [("0-3\n", {2, 3}), ("8-15\n", set()), ("\n", set()), ("what\n", set())],
)
def test_a_rank_keeps_to_those_near_cores_that_the_user_left_it(kernel, cpulist, near):
    kept = kernel(cpulist, {2, 3, 4})
    assert affinity.stay_near(PCI_ID) == near
    assert kept == ([near] if near else [])


def test_a_gpu_of_which_the_kernel_knows_nothing_changes_nothing(kernel):
    kept = kernel("0-3", {0, 1})
    assert affinity.stay_near("0000:00:1f.7") == set()
    assert kept == []
