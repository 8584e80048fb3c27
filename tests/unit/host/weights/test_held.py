"""Which models every rank holds, and whether a guest fits beside them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from comfy_xdit_patch.host.reading.models import KnownModel
from comfy_xdit_patch.host.weights.held import Held, RemoteWeights
from comfy_xdit_patch.host.weights.residency import Placement
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.requests import Residence

FLUX, FIRST, SECOND, OTHER = 1, 2, 3, 4
GIB = 1 << 30


@pytest.fixture
def weights():
    """FLUX and a ControlNet lie on two cards; the ControlNet was loaded last."""
    crew = SimpleNamespace(world_size=2, packs=None)
    made = RemoteWeights(crew, totals=Totals(), models=None, failed={}, verifies=False)
    made.held[FLUX] = Held("", Residence(), (12 * GIB, 12 * GIB))
    made.held[FIRST] = Held("", Residence(), (3 * GIB, 3 * GIB))
    return made


def lets_in(weights, number, room_gib, beside=(FLUX, FIRST, SECOND)):
    room = None if room_gib is None else room_gib * GIB
    return weights.lets_in(KnownModel(number, None), Placement(Residence(), room), beside)


@pytest.mark.parametrize(
    ("room_gib", "fits"), [(4, False), (11, False), (14, False), (15, True), (None, True)]
)
def test_a_second_controlnet_is_compared_with_flux_and_not_with_the_first_one_alone(
    weights, room_gib, fits
):
    """On cards that hold FLUX and one of them, it would drive FLUX away in every step."""
    assert lets_in(weights, SECOND, room_gib) == fits


def test_of_two_controlnets_for_one_place_one_stays(weights):
    weights.held[SECOND] = Held("", Residence(), (3 * GIB, 3 * GIB))  # FLUX came after both of them
    in_steps = [[lets_in(weights, number, 14) for number in (FIRST, SECOND)] for _ in range(3)]
    assert in_steps == [[False, True]] * 3


def test_a_model_that_the_run_does_not_use_may_give_way(weights):
    weights.held[OTHER] = Held("", Residence(), (12 * GIB, 12 * GIB))
    assert lets_in(weights, FIRST, 12)


def test_a_model_takes_nothing_beside_itself(weights):
    assert lets_in(weights, FIRST, 12)
    assert not lets_in(weights, FIRST, 11)


def test_the_rank_that_has_most_decides(weights):
    weights.held[FIRST] = Held("", Residence(tensor_degree=2), (1 * GIB, 5 * GIB))
    assert weights.bytes_of({FLUX, FIRST}) == 17 * GIB
    assert weights.bytes_of({SECOND}) == 0
