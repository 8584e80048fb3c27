"""Parts of attention are joined with their true weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from comfy_xdit_patch.worker.attention import lse
from comfy_xdit_patch.worker.attention.lse import (
    Bias,
    JoinedParts,
    attention_with_lse,
    plain_attention,
)

QUERIES, KEYS = 7, 12


def qkv(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (QUERIES, KEYS, KEYS))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def joined(q, k, v, *, ends, mask=None, function=attention_with_lse):
    parts = JoinedParts()
    for start, end in zip((0, *ends), (*ends, KEYS), strict=True):
        bias = None if mask is None else Bias.of(mask[..., start:end], q.dtype)
        parts.add(*function(q, k[:, :, start:end], v[:, :, start:end], bias=bias))
    return parts.result(q.dtype)


@pytest.mark.parametrize("ends", [(), (5,), (1, 2, 11)])
def test_joined_parts_are_the_whole(ends):
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(joined(q, k, v, ends=ends), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "shape", [(QUERIES, KEYS), (2, QUERIES, KEYS), (2, 1, 1, KEYS), (1, 3, QUERIES, KEYS)]
)
@pytest.mark.parametrize("is_boolean", [True, False])
def test_each_part_takes_its_keys_of_a_mask(shape, is_boolean):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = mask > -0.5 if is_boolean else mask.double()
    q, k, v = qkv()
    whole = mask.unsqueeze(1) if mask.ndim == 3 else mask
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=whole)
    out = joined(q, k, v, ends=(4, 9), mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)


def test_a_part_of_which_a_query_sees_nothing_weighs_nothing():
    q, k, v = qkv()
    seen = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    seen[0, :4] = seen[1, 4:] = seen[2] = False
    out = joined(q, k, v, ends=(4, 9), mask=seen)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    assert (out[:, :, 2] == 0).all(), "as torch has a query that sees nothing at all"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_plain_mathematics_gives_what_the_kernel_gives(dtype, monkeypatch):
    monkeypatch.setattr(lse, "MAX_SCORES", 2 * 3 * KEYS * 2)  # two queries at a time
    q, k, v = qkv(dtype)
    values = torch.randn(1, 3, 1, KEYS, generator=torch.Generator().manual_seed(3))
    bias = Bias.of(values.to(dtype), dtype)
    out, weight = plain_attention(q, k, v, bias.values, 0.3)
    expected, expected_weight = attention_with_lse(q, k, v, bias=bias, scale=0.3)
    assert (out.dtype, weight.dtype) == (expected.dtype, expected_weight.dtype)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    scores = 0.3 * q.double() @ k.double().transpose(-1, -2) + bias.values.double()
    exact = torch.logsumexp(scores, -1).reshape(weight.shape).to(weight.dtype)
    torch.testing.assert_close(weight, exact, rtol=1e-5, atol=1e-5)
    # torch's own kernel is off by 6e-5 in 16 bits where the processor has a quick exponential.
    kernels = 1e-4 if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(expected_weight, exact, rtol=kernels, atol=kernels)


@pytest.fixture
def plain_calls(monkeypatch):
    """Calls of the plain mathematics from now on."""
    calls = []

    def counted(*args):
        calls.append(args)
        return plain_attention(*args)

    monkeypatch.setattr(lse, "plain_attention", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_kernel_is_used_where_there_is_one(dtype, has_mask, plain_calls):
    q, k, v = qkv(dtype)
    bias = Bias.of(torch.randn(QUERIES, KEYS), dtype) if has_mask else None
    attention_with_lse(q, k, v, bias=bias)
    assert plain_calls == []


def test_what_the_kernels_refuse_is_computed_plainly(plain_calls):
    q, k, v = qkv(torch.float32)
    narrow = v[..., :5]  # values of another width than keys
    out, _ = attention_with_lse(q, k, narrow)
    assert len(plain_calls) == 1
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v)[..., :5])


def test_half_precision_is_joined_in_float32():
    q, k, v = qkv(torch.bfloat16)
    parts = JoinedParts()
    for n in range(KEYS):
        parts.add(*attention_with_lse(q, k[:, :, n : n + 1], v[:, :, n : n + 1]))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    # One key's output is that key's value without rounding: what is left is the last rounding.
    error = (parts.result(torch.float32).double() - expected).abs().max()
    assert error < 1e-5
    assert parts.result(torch.bfloat16).dtype == torch.bfloat16


def test_what_is_no_number_stays_none():
    q, k, v = qkv(torch.float32)
    v[0, 0, 1, 2] = torch.nan
    assert joined(q, k, v, ends=(4, 9))[0, 0].isnan().any()
