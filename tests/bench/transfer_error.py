"""How far attention is off when heads travel in 8 bits, in the product's forms and in others.

Run: PYTHONPATH=tests python tests/bench/transfer_error.py

Attention of 8 heads of FLUX.1's width, in float64 on what arrived, and its output sent back,
against the same with nothing in 8 bits. xfuser's row is made by its own functions, with scales that
were calibrated on these very tensors. Prints a table in Markdown, for docs/parity.md.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bench import xfuser_cpu

from comfy_xdit_patch.planning.transfers import VALUES_PER_SCALE, TransferDtype
from comfy_xdit_patch.worker.attention.transfer_dtypes import dequantised, quantised

HEADS, TOKENS, WIDTH = 8, 1280, 128
NUM_LARGE = 4
Form = Callable[[torch.Tensor], torch.Tensor]


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def narrow(x: torch.Tensor, dtype: TransferDtype, together: int) -> torch.Tensor:
    """Send and receive with one scale for so many values."""
    sent = quantised(x.contiguous().view(-1), dtype, together)
    return dequantised(sent, dtype, together, x.dtype).view(x.shape)


def hadamard() -> torch.Tensor:
    """Return an orthogonal matrix that spreads each channel over all."""
    whole = torch.ones(1, 1)
    while len(whole) < WIDTH:
        whole = torch.cat([torch.cat([whole, whole], 1), torch.cat([whole, -whole], 1)])
    return whole / WIDTH**0.5


def rotated(x: torch.Tensor, form: Form) -> torch.Tensor:
    there = (x.float() @ hadamard()).to(x.dtype)
    return (form(there).float() @ hadamard()).to(x.dtype)


def of_xfuser(x: torch.Tensor, *, is_rotated: bool) -> torch.Tensor:
    """Quantise as xfuser's ``fp8_comms`` does: q and k rotated, one scale for the tensor."""
    theirs = importlib.import_module("xfuser.core.distributed.fp8_comms")
    safety = importlib.import_module("xfuser.config.config").DEFAULT_FP8_COMMS_SAFETY_FACTOR
    # The only thing of AMD's package that it asks for is the name of a dtype.
    sys.modules["aiter"] = SimpleNamespace(  # type: ignore[assignment]
        dtypes=SimpleNamespace(fp8=torch.float8_e4m3fn)
    )

    def form(y: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = y.abs().amax().float().reshape(1) / (largest * safety)
        codes, scale = theirs._per_tensor_quant(y, scale)
        return (codes.float() * scale).to(y.dtype)

    return rotated(x, form) if is_rotated else form(x)


def activations(name: str) -> list[torch.Tensor]:
    """Make q, k and v in bf16: normal numbers, or as they leave RMS norms and RoPE."""
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator)
    q, k, v = (draw(1, HEADS, TOKENS, WIDTH) for _ in range(3))
    if name != "normal":
        # Tokens have something in common, and channels differ: a few by much, or all of them.
        q, k = (F.rms_norm(t + draw(1, HEADS, 1, WIDTH), (WIDTH,)) for t in (q, k))
        if name == "few large channels":
            large = torch.randperm(WIDTH, generator=generator)[:NUM_LARGE]
            weights = torch.full((WIDTH,), 0.6)
            weights[large] *= 8
            q, k = q * weights, k * weights
            v[..., large] *= 16
        else:
            q, k = (F.rms_norm(t * draw(WIDTH).mul(0.8).exp(), (WIDTH,)) for t in (q, k))
            v = v * draw(1, HEADS, 1, WIDTH).exp() * draw(1, HEADS, TOKENS, 1).mul(0.5).exp()
        q, k = with_positions(q), with_positions(k)
    return [t.bfloat16() for t in (q, k, v)]


def with_positions(x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(TOKENS)[:, None] * 10_000 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
    return torch.stack(turned, -1).flatten(-2)


def error(qkv: list[torch.Tensor], forms: tuple[Form, Form, Form, Form]) -> float:
    """Root mean square of the error of attention's output, over that of the output."""

    def attention(*of: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*(t.double() for t in of)).bfloat16()

    *into, back = forms
    found = back(attention(*(form(t) for form, t in zip(into, qkv, strict=True)))).double()
    expected = attention(*qkv).double()
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    torch.set_num_threads(1)
    xfuser_cpu.prepare()
    eight: dict[str, Form] = {}
    for dtype in ("int8", "fp8"):
        for together in (WIDTH, VALUES_PER_SCALE, 16):
            eight[f"{dtype}, {together}"] = partial(narrow, dtype=dtype, together=together)
    one_int8, one_fp8 = eight[f"int8, {WIDTH}"], eight[f"fp8, {WIDTH}"]
    ours_fp8 = eight[f"fp8, {VALUES_PER_SCALE}"]
    ours_int8 = eight[f"int8, {VALUES_PER_SCALE}"]
    turn_int8, turn_fp8 = (partial(rotated, form=form) for form in (one_int8, one_fp8))
    bytes_of = {n: (1 + 2 / n) / 2 for n in (WIDTH, VALUES_PER_SCALE, 16)}
    mixed = (3 * bytes_of[VALUES_PER_SCALE] + 1) / 4
    rows: list[tuple[str, float, tuple[Form, Form, Form, Form]]] = []
    for name, form in eight.items():
        dtype, together = name.split(", ")
        says = f"`{dtype}`, a scale for {together} values"
        says += " (the setting)" * (int(together) == VALUES_PER_SCALE)
        rows.append((says, bytes_of[int(together)], (form,) * 4))
    rows += [
        ("`int8`, 128, all rotated", bytes_of[WIDTH], (turn_int8,) * 4),
        ("`fp8`, 128, q and k rotated", bytes_of[WIDTH], (turn_fp8, turn_fp8, one_fp8, one_fp8)),
        ("`fp8`, 128, all rotated", bytes_of[WIDTH], (turn_fp8,) * 4),
        ("`int8`, 32, k in bf16", mixed, (ours_int8, same, ours_int8, ours_int8)),
        ("`fp8`, 32, k in bf16", mixed, (ours_fp8, same, ours_fp8, ours_fp8)),
    ]
    turned, plain = (partial(of_xfuser, is_rotated=is_rotated) for is_rotated in (True, False))
    rows.append(("xfuser 0.7.0, `fp8_comms`", 0.5, (turned, turned, plain, plain)))
    kinds = ("normal", "few large channels", "all channels differ")
    lines = [f"| form | bytes of bf16's | {' | '.join(kinds)} |", "|---|---|---|---|---|"]
    made = [activations(kind) for kind in kinds]
    for says, part, forms in rows:
        errors = " | ".join(f"{error(qkv, forms):.2%}" for qkv in made)
        lines.append(f"| {says} | {part:.0%} | {errors} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
