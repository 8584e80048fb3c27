"""Which way pictures of one size are decoded."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.host.decode.decoding import ONE_IS_FASTER, TO_COMPARE, Pace

SIZE = "1024 x 1024 px"


def compared(ranks: list[float], one: list[float]) -> Pace:
    pace = Pace()
    for seconds, alone in zip(ranks, one, strict=True):
        assert pace.alone(SIZE) is None
        pace.took(SIZE, seconds, is_one=False)
        assert pace.alone(SIZE) is TO_COMPARE
        pace.took(SIZE, alone, is_one=True)
    return pace


@pytest.mark.parametrize(
    ("ranks", "one", "expected"),
    [
        ([9.0, 1.0], [1.0, 2.0], None),
        ([1.0, 2.0], [9.0, 1.0], ONE_IS_FASTER),
        ([1.0, 2.0], [9.0, 2.0], None),
    ],
    ids=["the ranks", "ComfyUI alone", "equal"],
)
def test_the_faster_way_is_taken_and_what_warmed_up_does_not_count(ranks, one, expected):
    pace = compared(ranks, one)
    assert pace.alone(SIZE) is expected
    pace.took(SIZE, 99.0, is_one=expected is not None)
    assert pace.alone(SIZE) is expected


def test_each_size_is_measured_by_itself():
    pace = compared([1.0, 2.0], [9.0, 1.0])
    assert pace.alone("2048 x 2048 px") is None


def test_a_call_that_the_workers_could_not_compute_leaves_the_turn_with_them():
    pace = Pace()
    assert pace.alone(SIZE) is None
    assert pace.alone(SIZE) is None
