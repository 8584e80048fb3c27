"""Values in 8 bits: how far they are off, and that nothing becomes what it was not."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.planning.transfers import VALUES_PER_SCALE, transfer_bytes, values_per_scale
from comfy_xdit_patch.worker.attention.transfer_dtypes import dequantised, quantised

WIDTH = 128
DTYPES = ("int8", "fp8")
OF = (torch.float32, torch.bfloat16, torch.float16)
# Root mean square of the error over that of the values; normal numbers have 0.6 % and 2.4 %.
BOUNDS = {"int8": 0.008, "fp8": 0.027}
# Where one channel in 32 is 16 times the others, which decides about all that share its scale.
BOUNDS_OF_OUTLIERS = {"int8": 0.014, "fp8": 0.027}


def there_and_back(x, dtype, width=WIDTH):
    together = values_per_scale(width)
    wire = quantised(x.view(-1), dtype, together)
    assert wire.dtype == torch.uint8
    assert wire.numel() == transfer_bytes(
        x.numel(), dtype, head_width=width, value_bytes=x.element_size()
    )
    out = dequantised(wire, dtype, together, x.dtype)
    assert out.dtype == x.dtype
    return out.view(x.shape)


def numbers(of, *, channels_apart=0):
    x = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(5))
    if channels_apart:
        x[:, ::channels_apart] *= 16
    return x.to(of)


def relative(found, x):
    return ((found.double() - x.double()).norm() / x.double().norm()).item()


@pytest.mark.parametrize("of", OF, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_off_by_no_more_than_this(dtype, of, record_property):
    plain, outliers = numbers(of), numbers(of, channels_apart=VALUES_PER_SCALE)
    found = [relative(there_and_back(x, dtype), x) for x in (plain, outliers)]
    record_property("error", found)
    assert 1e-3 < found[0] <= BOUNDS[dtype]
    assert 1e-3 < found[1] <= BOUNDS_OF_OUTLIERS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_that_are_sent_stay_as_they_are(dtype):
    """They are attention's own result, which a node may have kept."""
    x = numbers(torch.bfloat16)
    before = x.clone()
    there_and_back(x, dtype)
    assert torch.equal(x, before)


def test_int8_is_three_times_nearer_than_fp8():
    x = numbers(torch.bfloat16)
    int8, fp8 = (relative(there_and_back(x, dtype), x) for dtype in DTYPES)
    assert fp8 > 3 * int8


@pytest.mark.parametrize("of", OF, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_value_of_any_row_never_changes_its_sign_or_its_size(dtype, of):
    """Scales are rounded: where that makes them smaller, a code could be one too large to hold."""
    x = torch.zeros(20_000, VALUES_PER_SCALE)
    x[:, 0] = torch.linspace(1, 2, len(x))
    x[:, 1] = -x[:, 0]
    x = x.to(of)
    error = (there_and_back(x, dtype, VALUES_PER_SCALE).double() - x.double()).abs()
    assert (error / x.double().abs().amax(1, keepdim=True)).max() <= 2**-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_what_is_not_finite_does_not_become_so(dtype):
    x = numbers(torch.bfloat16)
    x[0] = 0
    x[1, 3], x[2, 40] = torch.nan, torch.inf
    x[3] = torch.finfo(torch.bfloat16).max
    found = there_and_back(x, dtype)
    assert torch.equal(found[0], x[0])
    assert not found[1, 3].isfinite()
    assert not found[2, 40].isfinite()
    assert found[1, VALUES_PER_SCALE:].isfinite().all(), "others have scales of their own"
    assert found[4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rank_without_heads_sends_nothing(dtype):
    assert there_and_back(torch.empty(0, WIDTH, dtype=torch.bfloat16), dtype).numel() == 0


def test_bytes_of_a_head_in_bf16():
    sizes = {
        dtype: transfer_bytes(WIDTH, dtype, head_width=WIDTH, value_bytes=2)
        for dtype in ("exact", *DTYPES)
    }
    assert sizes == {"exact": 256, "int8": 136, "fp8": 136}
    assert values_per_scale(16) == 16
    assert values_per_scale(48) == 16
