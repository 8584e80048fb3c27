"""Compute the MLP's columns of a single block while its q, k and v are on their way to other ranks.

Runs in: worker process.

A single block of ComfyUI's has one linear for q, k, v and for what its MLP begins with. Attention
needs the first alone. So that linear computes these columns, and the others once the exchange of q,
k and v has begun: what it returns has its last columns filled in before attention goes on. Nothing
of the block reads them before attention has returned; of another ComfyUI that is looked up in the
block's code. The columns of a product do not depend on each other: their bits stay the same.

On a GPU the transfer takes none of the time in which these columns are computed.

A weight of another dtype, such as fp8, is cast as ComfyUI casts it, value by value: each column's
part by itself. Other weights that are not stored as they are multiplied (quantised, patched on the
fly, elsewhere) and linears around which somebody lies compute all columns at once, as ever.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType
from typing import Any

import torch

from comfy_xdit_patch.wire.casts import only_casts

LINEAR, NUM_ATTENDED = "linear1", 3
"""The linear of a single block, and of how many hidden sizes its attended columns are: q, k, v."""
COLUMNS, ATTENTION = "mlp", "attention"
"""Names in ``SingleStreamBlock.forward``: the other columns, and what is called with q, k, v."""
PLAIN = (torch.nn.Parameter, torch.Tensor)
"""Classes of weights that are stored as they are multiplied."""


class LaterColumns:
    """What single blocks have left to compute: of one linear at most, until attention is called.

    Their first linears get a forward of their own, once and for as long as the model lives. It is
    that of their class but while columns are left, and where somebody lies around it.
    """

    def __init__(self, flux: Any) -> None:
        self._left: Callable[[], object] | None = None
        self._leaves = False
        self._forwards: list[tuple[Any, Callable[..., torch.Tensor]]] = []
        for block in getattr(flux, "single_blocks", ()):
            linear = getattr(block, LINEAR, None)
            if linear is None or "forward" in vars(linear):
                continue
            if _reads_later(type(block).forward):
                forward = partial(self._forward, block, linear, linear.forward)
                vars(linear)["forward"] = forward
                self._forwards.append((linear, forward))

    def compute(self) -> None:
        """Compute what is left. Called while an exchange is on its way."""
        left, self._left = self._left, None
        if left is not None:
            left()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Have single blocks leave columns while this lasts."""
        self._leaves = True
        try:
            yield
            self._check()
        finally:
            self._leaves, self._left = False, None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave the linears as their class has them: blocks of one class share what is compiled."""
        ours = [(linear, own) for linear, own in self._forwards if vars(linear)["forward"] is own]
        for linear, _ in ours:
            del vars(linear)["forward"]
        try:
            yield
        finally:
            for linear, own in ours:
                vars(linear)["forward"] = own

    def _check(self) -> None:
        assert self._left is None, "a single block computed no attention"

    def _forward(
        self,
        block: Any,
        linear: Any,
        whole: Callable[[torch.Tensor], torch.Tensor],
        x_BLD: torch.Tensor,
    ) -> torch.Tensor:
        if not (self._leaves and self._is_alone(linear) and _is_product(linear, x_BLD)):
            return whole(x_BLD)
        self._check()
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
            partial(_multiply, rows_ND, weight, bias, out) for weight, bias, out in parts
        )
        now()
        return out_BLE

    def _is_alone(self, linear: Any) -> bool:
        """Whether nothing lies around a linear that would see a result with columns missing."""
        outermost = vars(linear).get("forward")
        is_ours = isinstance(outermost, partial) and outermost.func == self._forward
        return is_ours and not linear._forward_hooks


def _multiply(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, out_NE: torch.Tensor
) -> None:
    """Write the product into ``out_NE``; parameters of another dtype are cast to that of x."""
    stored = (weight_ED, bias_E)
    # A cast to the dtype that is there already is a call of torch's too.
    cast = (p if p is None or p.dtype == x_ND.dtype else p.to(x_ND.dtype) for p in stored)
    torch.ops.aten.linear.out(x_ND, *cast, out=out_NE)


def _is_product(linear: Any, x: torch.Tensor) -> bool:
    """Whether a linear is a product with its weight as it is stored, or with that cast."""
    weight, bias = linear.weight, linear.bias
    stored = [weight] if bias is None else [weight, bias]
    patched = getattr(linear, "weight_function", None) or getattr(linear, "bias_function", None)
    if patched or not all(type(one) in PLAIN and one.device == x.device for one in stored):
        return False
    if all(one.dtype == x.dtype for one in stored):
        return True
    return getattr(linear, "comfy_cast_weights", False) and only_casts(type(linear))


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
