"""Columns that wait for an exchange: when they are computed, and that they are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module

from comfy_xdit_patch.worker.shard.later_columns import LaterColumns

WIDTH, TOKENS = 64, 12


def attention(block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for all of it: asks for what is left, as an exchange does."""
    block.meanwhile()
    return q + k + v


class Casting(Linear):
    """Computes in the dtype of what it is given, as ComfyUI's linears do."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


class Block(Module):
    """ComfyUI's single block in what matters here: one linear, whose last columns come later."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        self.hidden_size = WIDTH
        self.linear1 = Casting(WIDTH, 7 * WIDTH, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = torch.split(self.linear1(x), [3 * WIDTH, 4 * WIDTH], dim=-1)
        return torch.cat((attention(self, *qkv.chunk(3, dim=-1)), mlp.relu()), 2)


class Early(Block):
    """Reads the last columns first."""

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = torch.split(self.linear1(x), [3 * WIDTH, 4 * WIDTH], dim=-1)
        mlp = mlp.relu()
        return torch.cat((attention(self, *qkv.chunk(3, dim=-1)), mlp), 2)


class Without(Block):
    """Has attention in its code, and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = torch.split(self.linear1(x), [3 * WIDTH, 4 * WIDTH], dim=-1)
        out = qkv if x.numel() else attention(self, qkv, qkv, qkv)
        return torch.cat((out, mlp), 2)


@pytest.fixture(autouse=True)
def _new_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is computed shows."""
    new_empty = Tensor.new_empty

    def filled(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return new_empty(tensor, *args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", filled)


def run(block: Any, x: Tensor, later: LaterColumns | None = None) -> tuple[Tensor, Tensor, bool]:
    """A block's result, with its columns at once and with some of them later; and if they were."""
    later = later or LaterColumns(SimpleNamespace(single_blocks=[block]))
    was_left: list[bool] = []

    def meanwhile() -> None:
        was_left.append(later._left is not None)
        later.compute()

    with torch.inference_mode():
        block.meanwhile = lambda: None
        expected = block(x)
        block.meanwhile = meanwhile
        with later.left():
            found = block(x)
        assert torch.equal(block(x), expected), "and afterwards"
    return expected, found, was_left[:1] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_last_columns_wait_for_the_exchange_and_are_the_same(dtype, bias, batch):
    block = Block(dtype, bias=bias)
    expected, found, was_left = run(block, torch.randn(batch, TOKENS, WIDTH).to(dtype))
    assert was_left, "not computed before the exchange has begun"
    assert torch.equal(expected, found)


def hooked(block: Block) -> None:
    block.linear1.register_forward_hook(lambda *_: None)


def wrapped(block: Block) -> None:
    forward = block.linear1.forward
    block.linear1.forward = lambda x: forward(x)  # as a bypass LoRA has it


def patched(block: Block) -> None:
    """ComfyUI applies a patch to the weight in each call."""
    block.linear1.weight_function = [lambda weight: weight]


def of_a_class(block: Block) -> None:
    """A quantised weight says of which dtype it is computed, not how it is stored."""
    block.linear1.weight.__class__ = type("Quantised", (torch.nn.Parameter,), {})


def stored_otherwise(block: Block) -> None:
    block.linear1.bfloat16()


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("change", [hooked, wrapped, patched, of_a_class, stored_otherwise])
def test_a_linear_that_is_no_plain_product_computes_all_columns_at_once(change, is_held):
    block = Block(torch.float32, bias=True)
    later = LaterColumns(SimpleNamespace(single_blocks=[block])) if is_held else None
    change(block)
    expected, found, was_left = run(block, torch.randn(1, TOKENS, WIDTH), later)
    assert not was_left
    assert torch.equal(expected, found)


def test_columns_are_left_again_once_nobody_lies_around_the_linear():
    block = Block(torch.float32, bias=True)
    later = LaterColumns(SimpleNamespace(single_blocks=[block]))
    ours = block.linear1.forward
    wrapped(block)
    assert not run(block, torch.randn(1, TOKENS, WIDTH), later)[2]
    block.linear1.forward = ours  # as a bypass LoRA ends
    assert run(block, torch.randn(1, TOKENS, WIDTH), later)[2]


def test_a_call_that_raised_leaves_nothing_for_the_next():
    block = Block(torch.float32, bias=True)
    later = LaterColumns(SimpleNamespace(single_blocks=[block]))

    def raises() -> None:
        raise RuntimeError("planted")

    block.meanwhile = raises
    x = torch.randn(1, TOKENS, WIDTH)
    with pytest.raises(RuntimeError, match="planted"), torch.inference_mode(), later.left():
        block(x)
    expected, found, was_left = run(block, x, later)
    assert was_left
    assert torch.equal(expected, found)


def test_a_block_that_reads_the_columns_before_attention_computes_them_at_once():
    block = Early(torch.float32, bias=True)
    expected, found, was_left = run(block, torch.randn(1, TOKENS, WIDTH))
    assert not was_left
    assert torch.equal(expected, found)


def test_a_block_that_calls_no_attention_is_an_error_and_no_image():
    with pytest.raises(AssertionError, match="computed no attention"):
        run(Without(torch.float32, bias=True), torch.randn(1, TOKENS, WIDTH))
