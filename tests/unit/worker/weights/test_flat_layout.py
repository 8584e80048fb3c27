"""Tensors of every kind become bytes and come back as views of bytes."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.worker.weights.flat_layout import ALIGNMENT, FlatLayout, round_up


class Packed(torch.Tensor):
    """As GGML's tensors are: packed bytes, the logical shape in an attribute."""

    @property
    def shape(self):
        return self.tensor_shape


class Scaled(torch.Tensor):
    """A wrapper around two inner tensors, as quantised tensors are."""

    @staticmethod
    def __new__(cls, data, scale, note):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data, scale, note):
        self.data_, self.scale, self.note = data, scale, note

    def __tensor_flatten__(self):
        return ["data_", "scale"], {"note": self.note}

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Scaled(inner["data_"], inner["scale"], context["note"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def whole(layout):
    """Join the shards of three ranks, each made by itself."""
    shard_bytes = round_up(-(-layout.num_bytes // 3), ALIGNMENT)
    shards = [torch.zeros(shard_bytes, dtype=torch.uint8) for _ in range(3)]
    for rank, shard in enumerate(shards):
        layout.copy_range(rank * shard_bytes, shard)
    return torch.cat(shards)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


PLAIN = {
    "float32": torch.randn(37, 129),
    "bf16": torch.randn(300, 7).bfloat16(),
    "fp8": torch.randn(64, 65).to(torch.float8_e4m3fn),
    "scale": torch.tensor(0.25),
    "empty": torch.zeros(0, 5),
    "one byte": torch.tensor([True]),
    "transposed": torch.randn(11, 13).T,
    "nan": torch.full((3,), float("nan")),
}


def test_plain_tensors_keep_their_bits_shape_and_dtype():
    layout = FlatLayout()
    recipes = {name: layout.add(tensor) for name, tensor in PLAIN.items()}
    flat = whole(layout)
    for name, tensor in PLAIN.items():
        made = recipes[name](flat)
        assert (made.shape, made.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(bits(made), bits(tensor)), name


def test_tensors_are_views_at_aligned_places():
    layout = FlatLayout()
    recipes = [layout.add(tensor) for tensor in PLAIN.values()]
    flat = whole(layout)
    for recipe in recipes:
        made = recipe(flat)
        if made.numel():
            assert (made.data_ptr() - flat.data_ptr()) % ALIGNMENT == 0
            assert made.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_a_parameter_that_wants_gradients_is_only_data():
    layout = FlatLayout()
    recipe = layout.add(torch.nn.Parameter(torch.ones(3)))
    assert not recipe(whole(layout)).requires_grad


def test_a_subclass_keeps_its_class_and_attributes():
    packed = torch.arange(34, dtype=torch.uint8).as_subclass(Packed)
    packed.tensor_shape, packed.tensor_type = torch.Size((1, 32)), "Q8_0"
    layout = FlatLayout()
    recipe = layout.add(packed)
    made = recipe(whole(layout))
    assert type(made) is Packed
    assert (made.shape, made.tensor_type) == ((1, 32), "Q8_0")
    assert made.as_subclass(torch.Tensor).tolist() == list(range(34))


def test_a_wrapper_is_made_again_from_its_inner_tensors():
    scaled = Scaled(torch.randn(8, 8).to(torch.float8_e4m3fn), torch.tensor(0.5), "note")
    layout = FlatLayout()
    recipe = layout.add(scaled)
    made = recipe(whole(layout))
    assert type(made) is Scaled
    assert torch.equal(bits(made.data_), bits(scaled.data_))
    assert (made.scale.item(), made.note) == (0.5, "note")


def test_a_tensor_without_data_is_an_error_with_its_shape():
    with pytest.raises(ValueError, match=r"\(2, 3\) is on the meta device"):
        FlatLayout().add(torch.empty(2, 3, device="meta"))
