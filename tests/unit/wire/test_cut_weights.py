"""Parts of weights are weights of the same kind, or the kind is refused."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.wire.tensors import can_cut, cut_to

kitchen = pytest.importorskip("comfy_kitchen.tensor")
RANGES = ((0, 32), (96, 128))


def quantised(layout, **options):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(128, 128, generator=generator)
    return kitchen.QuantizedTensor.from_float(weight, layout, **options)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_plain_weights_are_cut_and_joined(dim, dtype):
    weight = torch.nn.Parameter((torch.arange(128.0 * 128) / 64).view(128, 128).to(dtype), False)
    assert can_cut(weight)
    part = cut_to(weight, dim, RANGES)
    wide = weight.detach().float()
    expected = torch.cat([wide.narrow(dim, 0, 32), wide.narrow(dim, 96, 32)], dim)
    assert torch.equal(part.float(), expected)
    assert part.dtype == dtype
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == part.nbytes, "nothing of the whole is kept alive"


@pytest.mark.parametrize("dim", [0, 1])
def test_fp8_with_one_scale_keeps_it_and_its_class(dim):
    weight = quantised("TensorCoreFP8Layout", scale="recalculate")
    assert can_cut(weight)
    part = cut_to(weight, dim, RANGES)
    assert type(part) is type(weight)
    assert part.shape == torch.Size([64, 128] if dim == 0 else [128, 64])
    whole = weight.dequantize()
    expected = torch.cat([whole.narrow(dim, 0, 32), whole.narrow(dim, 96, 32)], dim)
    assert torch.equal(part.dequantize(), expected)
    if dim == 0:
        x = torch.randn(3, 128)
        assert torch.allclose(torch.nn.functional.linear(x, part), x @ expected.T, atol=1e-4)


@pytest.mark.parametrize(
    "layout", ["TensorCoreMXFP8Layout", "TensorCoreNVFP4Layout", "TensorWiseINT8Layout"]
)
def test_formats_with_scales_of_groups_are_not_cut(layout):
    assert not can_cut(quantised(layout))


def test_classes_that_cannot_be_taken_apart_are_not_cut():
    class Stored(torch.Tensor):
        """As GGUF's."""

    assert not can_cut(torch.zeros(4, 4).as_subclass(Stored))
    assert not can_cut(torch.zeros(4, 4, dtype=torch.int8))
