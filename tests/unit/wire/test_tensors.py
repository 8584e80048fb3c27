"""Weights of every class are taken apart, and their contents have names."""

from __future__ import annotations

import enum

import pytest
import torch

from comfy_xdit_patch.wire.tensors import (
    DIGEST_PIECE,
    ForeignTensorError,
    digest,
    digest_weight,
    take_apart,
)

FP8 = torch.float8_e4m3fn


class Kind(enum.IntEnum):
    Q8 = 8


class Stored(torch.Tensor):
    """Plain bytes under a class with attributes, like GGUF's."""

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())


class Wrapped(torch.Tensor):
    """Plain tensors inside of a class that speaks PyTorch's protocol."""

    @staticmethod
    def __new__(cls, data, scale, note):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data, scale, note):
        self.data_, self.scale, self.note = data, scale, note

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)

    def __tensor_flatten__(self):
        return ["data_", "scale"], {"note": self.note, "params": dict}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, FP8])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_equal_contents_have_equal_names_wherever_they_lie(dtype, size):
    whole = torch.arange(3 + size).to(dtype)
    view = whole[3:]  # begins in the middle of a word
    assert digest(view) == digest(view.clone())


def test_a_name_tells_one_bit_order_shape_and_dtype():
    base = torch.arange(64, dtype=torch.int32)
    flipped, swapped = base.clone(), base.clone()
    flipped[17] ^= 1
    swapped[[3, 40]] = swapped[[40, 3]]
    others = [flipped, swapped, base.view(8, 8), base.view(torch.float32), base[:-1]]
    names = [digest(tensor) for tensor in (base, *others)]
    assert len(set(names)) == len(names)


def test_a_name_tells_chunks_that_changed_places():
    piece = DIGEST_PIECE
    base = torch.zeros(2 * piece + 5, dtype=torch.int64)
    base[0] = 1
    moved = torch.roll(base, piece)
    assert digest(base) != digest(moved)
    assert digest(moved) == digest(torch.roll(base, piece))


def test_a_name_does_not_depend_on_strides():
    tensor = torch.rand(6, 10)
    assert digest(tensor.t()) == digest(tensor.t().contiguous())


def test_a_plain_weight_is_itself():
    weight = torch.nn.Parameter(torch.rand(4))
    inner, form = take_apart(weight)
    assert form.text == ""
    assert list(inner) == [""]
    assert torch.equal(inner[""], weight)


def test_a_wrapper_is_its_tensors_and_its_context():
    weight = Wrapped(torch.rand(4, 2), torch.rand(()), "fp8")
    inner, form = take_apart(weight)
    assert set(inner) == {"data_", "scale"}
    assert "Wrapped" in form.text
    assert "note:fp8" in form.text
    assert "builtins.dict" in form.text, "a class is spelt without an address"
    other = Wrapped(weight.data_.clone(), weight.scale.clone(), "fp8")
    assert digest_weight(other) == digest_weight(weight)
    assert digest_weight(Wrapped(weight.data_, weight.scale, "fp4")) != digest_weight(weight)
    assert digest_weight(Wrapped(weight.data_, weight.scale + 1, "fp8")) != digest_weight(weight)


def stored(**attributes):
    weight = torch.arange(34, dtype=torch.uint8).as_subclass(Stored)
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


def test_a_subclass_with_attributes_is_its_bytes_and_its_attributes():
    weight = stored(tensor_type=Kind.Q8, tensor_shape=torch.Size([4, 8]), patches=[object()])
    inner, form = take_apart(weight)
    assert type(inner[""]) is torch.Tensor
    assert inner[""].shape == (34,), "the bytes there are, not the shape they stand for"
    assert "tensor_type:8" in form.text
    assert "tensor_shape:(4,8)" in form.text
    assert "patches" not in form.text, "a LoRA of the moment is no part of the stored weight"
    assert digest_weight(weight) != digest_weight(stored(tensor_shape=torch.Size([8, 4])))


def test_a_class_that_keeps_more_is_refused_by_name():
    with pytest.raises(ForeignTensorError, match=r"^Stored$"):
        digest_weight(stored(table=object()))
