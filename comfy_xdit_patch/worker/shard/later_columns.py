"""Compute the MLP's columns of a single block while its q, k and v are on their way to other ranks.

Runs in: worker process.

A single block of ComfyUI's has one linear for q, k, v and for what its MLP begins with. Attention
needs the first alone. So that linear computes these columns, and the others once the exchange of q,
k and v has begun: what it returns has its last columns filled in before attention goes on. Nothing
of the block reads them before attention has returned; of another ComfyUI that is looked up in the
block's code. The columns of a product do not depend on each other: their bits stay the same.

On a GPU the transfer takes none of the time in which these columns are computed.

Weights that are not stored as they are multiplied (quantised, cast, patched on the fly) and linears
around which somebody lies compute all columns at once, as ever.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CodeType
from typing import Any

import torch

from comfy_xdit_patch.wire.own_attribute import own_attribute

LINEAR, NUM_ATTENDED = "linear1", 3
"""The linear of a single block, and of how many hidden sizes its attended columns are: q, k, v."""
COLUMNS, ATTENTION = "mlp", "attention"
"""Names in ``SingleStreamBlock.forward``: the other columns, and what is called with q, k, v."""
PLAIN = (torch.nn.Parameter, torch.Tensor)
"""Classes of weights that are stored as they are multiplied."""


class LaterColumns:
    """What single blocks have left to compute: of one linear at most, until attention is called."""

    def __init__(self) -> None:
        self._left: Callable[[], object] | None = None

    def compute(self) -> None:
        """Compute what is left. Called while an exchange is on its way."""
        left, self._left = self._left, None
        if left is not None:
            left()

    @contextmanager
    def of(self, flux: Any) -> Iterator[None]:
        """Have the first linears of a model's single blocks leave columns while this lasts."""
        with ExitStack() as stack:
            for block in flux.single_blocks:
                linear = getattr(block, LINEAR, None)
                if "forward" in vars(block):
                    continue  # It runs compiled, in one piece.
                if linear is not None and _reads_later(type(block).forward) and _is_alone(linear):
                    forward = partial(self._forward, block, linear, linear.forward)
                    stack.enter_context(own_attribute(linear, "forward", forward))
            yield
        assert self._left is None, "a single block computed no attention"

    def _forward(
        self,
        block: Any,
        linear: Any,
        whole: Callable[[torch.Tensor], torch.Tensor],
        x_BLD: torch.Tensor,
    ) -> torch.Tensor:
        assert self._left is None, "a single block computed no attention"
        if not _is_plain(linear, x_BLD):
            return whole(x_BLD)
        weight_ED, bias_E = linear.weight, linear.bias
        num_columns = weight_ED.shape[0]
        attended = NUM_ATTENDED * block.hidden_size
        sizes = [attended, num_columns - attended]
        out_BLE = x_BLD.new_empty(*x_BLD.shape[:-1], num_columns)
        rows_ND = x_BLD.flatten(0, -2)
        columns = torch.split(out_BLE.view(-1, num_columns), sizes, 1)
        biases = (None, None) if bias_E is None else torch.split(bias_E, sizes)
        parts = zip(torch.split(weight_ED, sizes), biases, columns, strict=True)
        now, self._left = (
            partial(torch.ops.aten.linear.out, rows_ND, weight, bias, out=out)
            for weight, bias, out in parts
        )
        now()
        return out_BLE


def _is_alone(linear: Any) -> bool:
    """Whether nothing lies around a linear that would see a result with columns missing."""
    return "forward" not in vars(linear) and not linear._forward_hooks


def _is_plain(linear: Any, x: torch.Tensor) -> bool:
    """Whether a linear is a product with its weight as it is stored."""
    weight, bias = linear.weight, linear.bias
    stored = [weight] if bias is None else [weight, bias]
    patched = getattr(linear, "weight_function", None) or getattr(linear, "bias_function", None)
    return not patched and all(
        type(one) in PLAIN and one.dtype == x.dtype and one.device == x.device for one in stored
    )


@functools.cache
def _reads_later(forward: Callable[..., Any]) -> bool:
    """Whether a block's code reads the columns only after it has called attention."""
    code: CodeType | None = getattr(forward, "__code__", None)
    if code is None:
        return False
    loads = [
        name
        for instruction in dis.get_instructions(code)
        if instruction.opname.startswith("LOAD")
        # From Python 3.13 on one instruction may load two names.
        for name in (
            instruction.argval if isinstance(instruction.argval, tuple) else [instruction.argval]
        )
    ]
    if ATTENTION not in loads or COLUMNS not in loads:
        return False
    return loads.index(ATTENTION) < loads.index(COLUMNS)
