"""Emulated cards: a CUDA graph captures kernels without effect, and a replay has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rig.server import EMULATED

# Each case has a graph, tensors and a process group; what it captures, and what it does then.
PROGRAM = """
import emulated_cuda, json, sys, torch
import torch.distributed as dist
import torch.nn.functional as F
dist.init_process_group("nccl", init_method="file://" + sys.argv[1], rank=0, world_size=1)
card, found = torch.device("cuda:0"), {}
for name, (captured, then) in json.loads(sys.argv[2]).items():
    printed, graph = [], torch.cuda.CUDAGraph()
    given, state = torch.ones(2, 4).to(card), torch.zeros(2, 4).to(card)
    here = {**globals(), "show": printed.append}
    try:
        with torch.no_grad():
            with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
                assert torch.cuda.is_current_stream_capturing()
                exec(captured, here)
            exec(then, here)
    except RuntimeError as error:
        printed.append(f"{error.__context__} {error}")
    found[name] = printed
print(json.dumps(found))
"""
EVENTS = (
    "a, b = (torch.cuda.Event(enable_timing=True, external={}) for _ in range(2)); "
    "a.record(); given.mul_(2); b.record()"
)
TOOK = "graph.replay(); show(a.elapsed_time(b) > 0)"
WORKS = {
    "each replay reads what is there": (
        "out = given * 2; state.add_(out); view = out[0, :2]",
        "show([out.isnan().all().item(), state.sum().item()])\n"
        "graph.replay(); show([view.tolist(), state.sum().item()])\n"
        "given.fill_(3); graph.replay(); show([view.tolist(), state.sum().item()])\n"
        "given = torch.zeros(2, 4).to(card); graph.replay(); show(view.tolist())",
        [[True, 0.0], [[2.0, 2.0], 16.0], [[6.0, 6.0], 64.0], [6.0, 6.0]],
    ),
    "attention, products and what is written out": (
        "q = given.view(1, 1, 2, 4); out = F.scaled_dot_product_attention(q, q, q); "
        "torch.ops.aten.linear.out(out, given, out=state.view(1, 1, 2, 4)[..., :2])",
        "show(state.sum().item()); graph.replay(); show(state[0].tolist())\n"
        "given.fill_(2); graph.replay(); show(state[0].tolist())",
        [0.0, [4.0, 4.0, 0.0, 0.0], [16.0, 16.0, 0.0, 0.0]],
    ),
    "each replay makes the exchanges": (
        "data = given * 2; work = dist.all_gather_into_tensor(state, data, async_op=True); "
        "work.wait(); out = state + 1; dist.all_reduce(out)",
        "show(state.sum().item()); graph.replay(); show(out.sum().item())\n"
        "given.fill_(3); graph.replay(); show(out.sum().item())",
        [0.0, 24.0, 56.0],
    ),
    "external events have a time": (EVENTS.format(True), TOOK, [True]),
}
NOT_PERMITTED = "operation not permitted when stream is capturing"
FAILS = {
    "reads a number": ("given.sum().item()", "", NOT_PERMITTED),
    "asks for the truth": ("bool((given > 0).all())", "", NOT_PERMITTED),
    "copies to the host": ("given.cpu()", "", NOT_PERMITTED),
    "copies from the host": ("given.copy_(torch.ones(2, 4))", "", NOT_PERMITTED),
    "makes a tensor of a list": ("torch.tensor([1, 2], device=card)", "", NOT_PERMITTED),
    "waits for the card": ("torch.cuda.synchronize()", "", NOT_PERMITTED),
    "waits for its stream": ("torch.cuda.current_stream().synchronize()", "", NOT_PERMITTED),
    "looks at a list": ("given.tolist()", "", NOT_PERMITTED),
    "asks for an event": ("torch.cuda.Event().query()", "", NOT_PERMITTED),
    "asks for the time of an event of its own": (EVENTS.format(False), TOOK, "last recorded in"),
    "is reset": ("given.mul_(2)", "graph.reset(); graph.replay()", "the graph has been reset"),
    # The last one: what it leaves on its way stays there.
    "leaves an exchange": (
        "dist.all_gather_into_tensor(state, given, async_op=True)",
        "",
        "unjoined work",
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """What all cases showed: they share a process, for an import of torch takes seconds."""
    store: Path = tmp_path_factory.mktemp("graphs") / "store"
    cases = {name: case[:2] for name, case in (WORKS | FAILS).items()}
    env = {**os.environ, "PYTHONPATH": str(EMULATED), "EMULATED_CARDS": "4090"}
    command = [sys.executable, "-c", PROGRAM, str(store), json.dumps(cases)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    shown: dict[str, list[object]] = json.loads(ended.stdout)
    return shown


@pytest.mark.parametrize("name", WORKS)
def test_nothing_takes_effect_before_a_replay_and_all_of_it_does_then(
    found: dict[str, list[object]], name: str
) -> None:
    assert found[name] == WORKS[name][2]


@pytest.mark.parametrize("name", FAILS)
def test_what_a_card_could_not_do_is_an_error(found: dict[str, list[object]], name: str) -> None:
    (error,) = found[name]
    assert FAILS[name][2] in str(error)
    if FAILS[name][2] == NOT_PERMITTED:
        assert "failed due to a previous error during capture" in str(error), "the graph is lost"
