"""Which calls are exact: the first of each stream, and the first after anything changed."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.host.run import Streams

SCHEDULE = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0]


def exact(calls, num_warm_up_calls=1):
    """Return which of these calls (key, state, sigma) are exact."""
    streams = Streams(num_warm_up_calls)
    return [
        streams.is_warm_up(streams.of(key, number), state=state, sigma=sigma, schedule=SCHEDULE)
        for number, (key, state, sigma) in enumerate(calls)
    ]


@pytest.mark.parametrize(
    ("sigmas", "expected"),
    [
        ([1.0, 0.9, 0.8], [True, False, False]),
        ([0.9, 0.9, 0.8, 0.8], [True, False, False, False]),  # heun
        ([1.0, 0.95, 0.9, 0.85], [True, False, False, False]),  # dpm_2: between two steps
        ([0.9, 0.9 * (1 + 1e-6), 0.8], [True, False, False]),  # the same in float32
        ([0.8, 0.9, 0.8], [True, True, False]),  # rising: denoising begins again
        ([1.0, 0.8, 0.7], [True, True, False]),  # a step was computed elsewhere
        ([0.5, 0.0], [True, False]),
    ],
)
def test_a_stream_goes_on_while_sigma_falls_step_by_step(sigmas, expected):
    assert exact([("a", "same", sigma) for sigma in sigmas]) == expected


def test_a_stream_begins_anew_when_its_state_changes_and_when_it_changes_back():
    calls = [("a", state, 0.9) for state in ("one", "one", "two", "two", "one")]
    assert exact(calls) == [True, False, True, False, True]


def test_streams_know_nothing_of_each_other():
    calls = [("cond", 1, 1.0), ("uncond", 2, 1.0), ("cond", 1, 0.9), ("uncond", 2, 0.9)]
    assert exact(calls) == [True, True, False, False]


@pytest.mark.parametrize("num_warm_up_calls", [0, 1, 3])
def test_as_many_calls_are_exact_as_were_asked_for_each_time_a_stream_begins(num_warm_up_calls):
    calls = [("a", "one", 0.9)] * 4 + [("a", "two", 0.9)] * 4
    each = [True] * num_warm_up_calls + [False] * (4 - num_warm_up_calls)
    assert exact(calls, num_warm_up_calls) == [*each, *each]


def test_a_stream_keeps_its_number_when_it_begins_anew():
    streams = Streams()
    assert [streams.of("a", 7).number, streams.of("b", 8).number] == [7, 8]
    assert streams.of("a", 9).number == 7
    assert streams.numbers == [7, 8]
