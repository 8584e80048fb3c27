"""Emulated cards: what an exchange works with is not used before somebody has waited for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rig.server import EMULATED

ALONE = """
import emulated_cuda, sys, torch
import torch.distributed as dist
dist.init_process_group("nccl", init_method="file://" + sys.argv[1], rank=0, world_size=1)
data, out = torch.ones(4).to("cuda:0"), torch.zeros(4).to("cuda:0")
work = dist.all_gather_into_tensor(out, data, async_op=True)
half = out[:2]
{early}
work.wait()
{late}
print((half + data[:2]).tolist())
"""
USES = {
    "reads what comes": "half + 1",
    "copies what comes": "torch.cat([out, data])",
    "writes what comes": "out.zero_()",
    "writes what goes": "data[1:].mul_(2)",
}


def python(path: Path, early: str, late: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(EMULATED), "EMULATED_CARDS": "4090"}
    code = ALONE.format(early=early, late=late)
    command = [sys.executable, "-c", code, str(path / "store")]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("use", USES)
def test_a_use_before_the_wait_is_an_error(tmp_path: Path, use: str) -> None:
    ended = python(tmp_path, USES[use], "")
    assert ended.returncode == 1
    assert "of an exchange that the stream has not waited for" in ended.stderr


def test_what_goes_may_be_read_and_after_the_wait_all_is_allowed(tmp_path: Path) -> None:
    ended = python(tmp_path, "data + 1", "; ".join(("data.mul_(2)", "out + 1")))
    assert ended.stdout.strip() == "[3.0, 3.0]", ended.stderr
