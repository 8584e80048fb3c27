"""Blocks are compiled in one piece, and whatever cannot be runs as it is.

The module stands for ComfyUI's, with its names. Real blocks on real ranks are in
``tests/parallel/test_compiled.py``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.worker.shard import compiled_blocks
from comfy_xdit_patch.worker.shard.compiled_blocks import CompiledBlocks

NUM_BLOCKS = 3
ASKED = {"backend": "eager", "options": {}, "dynamic": None, "blocks": None}


def fixed(q: Any, k: Any, v: Any, heads: int, mask: Any = None, **options: Any) -> torch.Tensor:
    """Stands for attention and for all that ranks do in it."""
    CALLS.append(options["transformer_options"])
    return (q + k + v).transpose(1, 2).flatten(2)


CALLS: list[Any] = []


class Block(torch.nn.Module):
    def __init__(self, math: Any, **more: Any) -> None:
        super().__init__()
        self.math, self.more = math, more
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: Any, transformer_options: Any) -> Any:
        q = self.linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
        options = {"skip_reshape": True, "transformer_options": transformer_options, **self.more}
        return x + self.math.optimized_attention(q, q, q, 2, mask=None, **options)


@pytest.fixture
def math(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("comfy", "comfy.ldm", "comfy.ldm.flux", "comfy.ldm.flux.math"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["comfy.ldm.flux.math"]
    sys.modules["comfy.ldm.flux"].math = module  # type: ignore[attr-defined]
    module.optimized_attention = fixed  # type: ignore[attr-defined]
    CALLS.clear()
    yield module
    assert module.optimized_attention is fixed, "put back"
    torch.compiler.reset()


def flux_of(math: Any, **more: Any) -> Any:
    flux = torch.nn.Module()
    flux.double_blocks = torch.nn.ModuleList(Block(math, **more) for _ in range(NUM_BLOCKS))
    flux.single_blocks = torch.nn.ModuleList()
    return flux.requires_grad_(False)


def run(flux: Any, options: Any) -> torch.Tensor:
    x = torch.linspace(-1, 1, 40).view(1, 5, 8)
    for block in flux.double_blocks:
        x = block(x, transformer_options=options)
    return x


def outcome_of(blocks: CompiledBlocks, flux: Any, asked: Any = ASKED, **options: Any) -> Any:
    """Compare a call with one that is not compiled; return what became of its blocks."""
    expected = run(flux, options)
    CALLS.clear()
    with blocks.of(flux, asked, None) as outcome:
        found = run(flux, options)
    assert torch.equal(expected, found)
    assert [options] * NUM_BLOCKS == CALLS, "once for each block, with the options of the call"
    assert all("forward" not in vars(block) for block in flux.double_blocks)
    return outcome


def test_what_changes_from_step_to_step_compiles_nothing(math):
    blocks, flux = CompiledBlocks(), flux_of(math)
    for step in range(3):
        moves = compiled_blocks.num_moves()
        outcome = outcome_of(blocks, flux, block_index=step, sigmas=torch.tensor([float(step)]))
        assert compiled_blocks.num_moves() - moves == 2 * (step == 0), "the host sees that"
        assert outcome.num_compiled == NUM_BLOCKS
        assert outcome.num_graphs == (step == 0)
        assert outcome.reason == ""


def test_nothing_is_asked_or_something_is_in_the_way(math):
    blocks, flux = CompiledBlocks(), flux_of(math)
    assert outcome_of(blocks, flux, None) == compiled_blocks.Outcome()
    with blocks.of(flux, ASKED, Refusal("the reason")) as outcome:
        run(flux, {})
    assert outcome == compiled_blocks.Outcome(reason="the reason")
    assert not blocks.is_in_use


def test_a_module_that_prescribes_no_attention_is_no_obstacle(math):
    preferred = torch.nn.Module()
    preferred.function = None
    outcome = outcome_of(CompiledBlocks(), flux_of(math, preferred_attention=preferred))
    assert outcome.num_compiled == NUM_BLOCKS


def test_attention_with_more_arguments_lies_outside_of_what_is_compiled(math):
    outcome = outcome_of(CompiledBlocks(), flux_of(math, scale=2.0))
    assert outcome.num_compiled == 0
    assert outcome.reason.startswith("torch did not compile 3 of 3: ")


def test_a_compiler_that_fails_is_tried_once(math):
    blocks, flux, asked = CompiledBlocks(), flux_of(math), {**ASKED, "backend": "none"}
    first, second = (outcome_of(blocks, flux, asked) for _ in range(2))
    assert (first.num_graphs, first.num_compiled) == (1, 0)
    assert first.reason.startswith("torch did not compile 3 of 3: InvalidBackend: ")
    assert second == compiled_blocks.Outcome(reason=first.reason)
    assert outcome_of(blocks, flux).num_compiled == NUM_BLOCKS, "other settings are tried"


def test_an_exception_of_the_call_is_that_of_the_call(math):
    flux = flux_of(math)

    def raising(*_: Any, **__: Any) -> torch.Tensor:
        raise ConnectionError("a peer is gone")

    math.optimized_attention = raising
    try:
        with pytest.raises(ConnectionError, match="a peer is gone"):  # noqa: SIM117
            with CompiledBlocks().of(flux, ASKED, None):
                run(flux, {})
    finally:
        math.optimized_attention = fixed
