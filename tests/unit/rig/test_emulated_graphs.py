"""Emulated cards: a CUDA graph captures kernels without effect, and a replay has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rig.server import EMULATED

BEGIN = """
import emulated_cuda, sys, torch
import torch.distributed as dist
import torch.nn.functional as F
dist.init_process_group("nccl", init_method="file://" + sys.argv[1], rank=0, world_size=1)
card = torch.device("cuda:0")
given, state = torch.ones(2, 4).to(card), torch.zeros(2, 4).to(card)
graph = torch.cuda.CUDAGraph()
"""
CAPTURED = """
with torch.no_grad():
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
        assert torch.cuda.is_current_stream_capturing()
        {captured}
    {then}
"""
NOT_PERMITTED = {
    "reads a number": "given.sum().item()",
    "asks for the truth": "bool((given > 0).all())",
    "copies to the host": "given.cpu()",
    "copies from the host": "given.copy_(torch.ones(2, 4))",
    "makes a tensor of a list": "torch.tensor([1, 2], device=card)",
    "waits for the card": "torch.cuda.synchronize()",
    "waits for its stream": "torch.cuda.current_stream().synchronize()",
    "looks at a list": "given.tolist()",
    "asks for an event": "torch.cuda.Event().query()",
    "leaves an exchange": "dist.all_gather_into_tensor(state, given, async_op=True)",
}


def python(path: Path, captured: str, then: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(EMULATED), "EMULATED_CARDS": "4090"}
    code = BEGIN + CAPTURED.format(captured=captured, then=then)
    command = [sys.executable, "-c", code, str(path / "store")]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def printed(path: Path, captured: str, *then: str) -> list[str]:
    ended = python(path, captured, "; ".join(then))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_nothing_takes_effect_before_the_replay_and_each_replay_reads_what_is_there(
    tmp_path: Path,
) -> None:
    lines = printed(
        tmp_path,
        "out = given * 2; state.add_(out); view = out[0, :2]",
        "print(out.isnan().all().item(), state.sum().item())",
        "graph.replay(); print(view.tolist(), state.sum().item())",
        "given.fill_(3); graph.replay(); print(view.tolist(), state.sum().item())",
        "given = torch.zeros(2, 4).to(card); graph.replay(); print(view.tolist())",
    )
    assert lines == ["True 0.0", "[2.0, 2.0] 16.0", "[6.0, 6.0] 64.0", "[6.0, 6.0]"]


def test_attention_products_and_what_is_written_out_are_kernels_too(tmp_path: Path) -> None:
    lines = printed(
        tmp_path,
        "q = given.view(1, 1, 2, 4); out = F.scaled_dot_product_attention(q, q, q); "
        "torch.ops.aten.linear.out(out, given, out=state.view(1, 1, 2, 4)[..., :2])",
        "print(state.sum().item())",
        "graph.replay(); print(state.tolist())",
        "given.fill_(2); graph.replay(); print(state.tolist())",
    )
    row, doubled = [4.0, 4.0, 0.0, 0.0], [16.0, 16.0, 0.0, 0.0]
    assert lines == ["0.0", str([row, row]), str([doubled, doubled])]


def test_exchanges_are_made_by_each_replay(tmp_path: Path) -> None:
    lines = printed(
        tmp_path,
        "data = given * 2; work = dist.all_gather_into_tensor(state, data, async_op=True); "
        "work.wait(); out = state + 1; dist.all_reduce(out)",
        "print(state.sum().item())",
        "graph.replay(); print(out.sum().item())",
        "given.fill_(3); graph.replay(); print(out.sum().item())",
    )
    assert lines == ["0.0", "24.0", "56.0"]


def test_only_external_events_have_a_time(tmp_path: Path) -> None:
    make = "a, b = (torch.cuda.Event(enable_timing=True, external={}) for _ in range(2)); "
    record = "a.record(); given.mul_(2); b.record()"
    took = "graph.replay(); print(a.elapsed_time(b) > 0)"
    assert printed(tmp_path, make.format(True) + record, took) == ["True"]
    (tmp_path / "other").mkdir()
    ended = python(tmp_path / "other", make.format(False) + record, took)
    assert "last recorded in a capturing stream" in ended.stderr


@pytest.mark.parametrize("use", NOT_PERMITTED)
def test_what_the_host_does_meanwhile_is_an_error_and_loses_the_graph(
    tmp_path: Path, use: str
) -> None:
    ended = python(tmp_path, NOT_PERMITTED[use], "print('captured')")
    assert ended.returncode == 1
    assert "captured" not in ended.stdout
    assert "failed due to a previous error during capture" in ended.stderr


def test_a_graph_that_was_reset_cannot_be_replayed(tmp_path: Path) -> None:
    ended = python(tmp_path, "given.mul_(2)", "graph.reset(); graph.replay()")
    assert "the graph has been reset" in ended.stderr
