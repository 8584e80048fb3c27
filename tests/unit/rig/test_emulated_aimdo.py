"""The stand-in of comfy-aimdo counts memory as a card would; a weight that went is not there."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rig.server import EMULATED

CARD = 1
PAGE = 32 << 20


@pytest.fixture
def aimdo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, with a card that has room for two pages."""
    monkeypatch.syspath_prepend(str(EMULATED))
    monkeypatch.setenv("EMULATED_CARDS", "4090,4090:0.0625")
    module = importlib.import_module("emulated_aimdo")
    yield module
    assert not module.allocator.BOOKS.used(CARD), "what a model had on the card is given back"


def written(memory: Any, place: tuple[Any, int, int]) -> torch.Tensor:
    tensor: torch.Tensor = memory.tensor(*place[1:]).view(torch.bfloat16)
    return tensor.fill_(1.0)


def test_a_weight_that_stays_is_told_from_one_that_came_again(aimdo: Any) -> None:
    model = aimdo.ModelVBAR(10 * PAGE, CARD)
    place = model.alloc(1000)
    first = aimdo.vbar_fault(place)
    assert aimdo.vbar_signature_compare(first, aimdo.vbar_fault(place))
    assert not aimdo.vbar_signature_compare(first, None)
    assert model.loaded_size() == aimdo.vbars_analyze(CARD) == PAGE
    assert model.free_memory(1e30) == 0, "it is in use"
    for _ in range(2):
        aimdo.vbar_unpin(place)
    weight = written(model, place)
    assert model.free_memory(1) == PAGE
    assert weight.isnan().all()
    assert not aimdo.vbar_signature_compare(first, aimdo.vbar_fault(place))


def test_other_models_make_room_and_without_any_the_weight_does_not_come(aimdo: Any) -> None:
    old, new = aimdo.ModelVBAR(10 * PAGE, CARD), aimdo.ModelVBAR(10 * PAGE, CARD)
    in_old, in_new = old.alloc(2 * PAGE), new.alloc(PAGE)
    assert aimdo.vbar_fault(in_old)
    assert aimdo.vbar_fault(in_new) is None, "all of the card is in use"
    aimdo.vbar_unpin(in_old)
    assert aimdo.vbar_fault(in_new)
    assert (old.loaded_size(), new.loaded_size()) == (PAGE, PAGE)


def test_a_file_is_read_by_address(aimdo: Any, tmp_path: Any) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(200)))
    mapped, buffer = aimdo.ModelMMAP(path), aimdo.HostBuffer(0, 0, 4096)
    start = buffer.extend(100)
    buffer.read_file_slice(mapped.get_file_handle(), 50, 100, start - buffer.get_raw_address())
    assert aimdo.hostbuf_to_tensor(buffer).tolist() == list(range(50, 150))
    assert mapped.tensor(mapped.get(), 3).tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="grow"):
        buffer.extend(5000)
    buffer.truncate(10)
    assert buffer.size == 10
