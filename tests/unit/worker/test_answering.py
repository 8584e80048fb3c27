"""When a rank that raised may go on, and when nobody knows what the others are at."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from comfy_xdit_patch.wire.messages.replies import Raised
from comfy_xdit_patch.wire.messages.requests import Forward
from comfy_xdit_patch.worker import answering
from comfy_xdit_patch.worker.ranks import collectives

ULYSSES, STAGES = [1, 1, 1, 2, 1], [1, 2, 1, 1, 1]


def answer(error, *, num_exchanges=0, grid=ULYSSES, settle=lambda: None):
    message = Forward(request=7, model=1, grid=grid, weights=[], arguments={}, result=0)
    return answering.answer(
        error,
        message,
        num_exchanges=num_exchanges,
        residents=SimpleNamespace(settle=settle),
        groups=SimpleNamespace(device=torch.device("cpu")),
    )


@pytest.mark.parametrize("num_exchanges", [0, 5])
def test_an_error_of_the_models_own_is_answered(num_exchanges):
    said = answer(ValueError("5 dimensions"), num_exchanges=num_exchanges)
    assert said == Raised(7, "ValueError", "5 dimensions", num_exchanges)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (torch.OutOfMemoryError("2 GiB"), {}),
        (MemoryError(), {}),
        (ValueError("in a stage"), {"grid": STAGES, "num_exchanges": 1}),
    ],
)
def test_what_others_may_not_have_met_is_raised(error, options):
    with pytest.raises(type(error)) as caught:
        answer(error, **options)
    assert caught.value is error


def test_an_error_in_a_stage_before_anything_was_sent_is_answered():
    assert isinstance(answer(ValueError("no"), grid=STAGES), Raised)


def test_a_rank_whose_exchange_failed_does_not_say_that_it_is_well(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(collectives, "_num_open", 0)
    monkeypatch.setattr(collectives.dist, "all_reduce", fails)
    with pytest.raises(RuntimeError):
        collectives.all_reduce_max(torch.zeros(()))
    assert collectives.is_in_one()
    with pytest.raises(RuntimeError, match="planted"):
        answer(RuntimeError("planted"))


def test_what_was_begun_ahead_is_ended_first(monkeypatch):
    class Work:
        def wait(self):
            pass

    monkeypatch.setattr(collectives, "_num_open", 0)
    monkeypatch.setattr(collectives.dist, "all_gather_into_tensor", lambda *_, **__: Work())
    work = collectives.all_gather_into_async(torch.zeros(2), torch.zeros(1), group=None)
    said = answer(ValueError("no"), settle=lambda: collectives.finish([work]))
    assert isinstance(said, Raised)
    assert not collectives.is_in_one()
