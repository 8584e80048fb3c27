"""Weight tensors reach shared memory once for each content, and leave it with their owners."""

from __future__ import annotations

import gc

import pytest
import torch

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.wire import packs as module
from comfy_xdit_patch.wire.packs import NoRoomError, PackMap, PackTable, check_room
from comfy_xdit_patch.wire.slots import SlotMap, SlotTable


class Model:
    """Anything that can own weights."""


class Both:
    """Both sides in one process; the slots are real ones."""

    def __init__(self):
        self.slots = SlotTable()
        self.table = PackTable(self.slots.create, self.slots.drop)
        self.far = SlotMap(torch.device("cpu"))
        self.map = PackMap(self.far.__getitem__)

    def place(self, *tensors, **options):
        trees = self.table.place(tensors, **options)
        for slot, fd in self.slots.take_created():
            self.far.add(slot.number, fd, slot.size_bytes)
        self.far.drop(self.slots.take_dropped())
        return trees


@pytest.fixture
def both():
    return Both()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64]
)
def test_tensors_arrive_as_they_were(both, dtype):
    sent = [torch.rand(5, 3).to(dtype), torch.tensor(2.0).to(dtype), torch.rand(0, 4).to(dtype)]
    for tensor, tree in zip(sent, both.place(*sent), strict=True):
        arrived = both.map.tensor(tree["$pack"])
        assert arrived.dtype == dtype
        assert arrived.shape == tensor.shape
        assert arrived.flatten().tolist() == tensor.flatten().tolist()
        assert arrived.data_ptr() % module.ALIGNMENT == 0


def test_views_arrive_as_contents(both):
    base = torch.rand(8, 6)
    (tree,) = both.place(base.t()[1:3])
    assert torch.equal(both.map.tensor(tree["$pack"]), base.t()[1:3])


def test_the_same_tensor_and_the_same_contents_are_sent_once(both):
    tensor = torch.rand(100)
    first = both.place(tensor, tensor.clone())
    assert first[0] == first[1]
    written = both.table.bytes_written
    assert written == tensor.nbytes
    assert both.place(tensor) == first[:1]
    assert both.place(tensor.clone()) == first[:1]
    assert both.table.bytes_written == written


def test_a_tensor_changed_in_place_is_sent_again(both):
    tensor = torch.rand(100)
    (first,) = both.place(tensor)
    tensor.mul_(2)
    (second,) = both.place(tensor)
    assert first != second
    assert torch.equal(both.map.tensor(second["$pack"]), tensor)


def test_tensors_made_in_inference_mode_can_be_sent(both):
    with torch.inference_mode():
        tensor = torch.rand(10)
        (tree,) = both.place(tensor)
        assert both.place(tensor) == [tree]


def test_what_was_dropped_is_kept_within_a_limit_and_then_given_up(both, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 10_000)
    loras = [torch.full((1000,), float(i)) for i in range(4)]
    trees = [both.place(lora)[0] for lora in loras]
    copies = [lora.clone() for lora in loras]
    del loras
    gc.collect()
    written = both.table.bytes_written
    both.place(copies[3])  # the last two are kept: 2 x 4096 bytes
    assert both.table.bytes_written == written
    assert both.map.tensor(trees[3]["$pack"]).eq(3).all()
    both.place(copies[0])
    assert both.table.bytes_written == written + copies[0].nbytes, "the first was given up"


def test_nothing_living_is_given_up(both, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    tensors = [torch.full((1000,), float(i)) for i in range(50)]
    trees = [both.place(tensor)[0] for tensor in tensors]
    for tensor, tree in zip(tensors, trees, strict=True):
        assert torch.equal(both.map.tensor(tree["$pack"]), tensor)
        assert both.place(tensor) == [tree]


def test_weights_of_a_model_live_with_the_model(both, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    model = Model()
    (tree,) = both.place(torch.ones(1000), owner=model)
    gc.collect()
    written = both.table.bytes_written
    assert both.place(torch.ones(1000)) == [tree]
    assert both.table.bytes_written == written
    del model
    gc.collect()
    both.place(torch.zeros(8))
    (again,) = both.place(torch.ones(1000))
    assert again != tree
    assert both.table.bytes_written > written


def test_kept_contents_can_be_dropped_at_once(both):
    (tree,) = both.place(torch.ones(1000))
    gc.collect()
    both.table.drop_kept()
    (again,) = both.place(torch.ones(1000))
    assert again != tree


def test_what_is_not_what_was_sent_is_an_error(both):
    tensor = torch.rand(50)
    (tree,) = both.place(tensor)
    both.far[tree["$pack"][0]].view(torch.float32, (50,))[17] += 1
    with pytest.raises(MessageError, match="as ComfyUI has them"):
        both.map.tensor(tree["$pack"])


def test_more_than_half_of_the_free_memory_is_refused():
    check_room(1 << 20)
    with pytest.raises(NoRoomError, match=r"^1152921.* GB of weights, \d+\.\d GB are free$"):
        check_room(1 << 60)
