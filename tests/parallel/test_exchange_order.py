"""The check of noted exchanges finds every kind of misfit."""

from __future__ import annotations

from typing import Any

import pytest
from exchange_order import Exchange, misfits, misplaced

CARD = "cuda:0"


def exchange(
    *, op: str = "all_to_all", ranks: tuple[int, ...] = (0, 1), size: int = 4, **changed: Any
) -> Exchange:
    """Make an exchange in which every rank sends so much to every rank."""
    sizes = [size] * len(ranks)
    whole = [CARD, True, sum(sizes)]
    made = {"op": op, "group": f"tokens {ranks}", "with": list(ranks), "sent": sizes}
    return {**made, "received": sizes, "tensors": [whole, whole], **changed}


def pair(ranks: tuple[int, int], sent: list[int], received: list[int]) -> Exchange:
    return exchange(op="pair", ranks=ranks, sent=sent, received=received)


def test_what_fits_passes() -> None:
    near, far = exchange(ranks=(0, 1)), exchange(ranks=(2, 3), size=3)
    across = [exchange(op="sum", ranks=ranks) for ranks in ((0, 2), (1, 3))]
    ranks = [[near, across[0]], [near, across[1]], [far, across[0]], [far, across[1]]]
    assert misfits(ranks) == []
    assert misfits([[pair((0, 1), [0, 4], [0, 0])], [pair((0, 1), [0, 0], [4, 0])]]) == []


A, B = exchange(), exchange(group="weights (0, 1)")
MISFITS: dict[str, tuple[list[list[Exchange]], str]] = {
    "one more": ([[A, A], [A]], "rank 0 waits in exchange 1 of 2: all_to_all of tokens"),
    "another order": ([[A, B], [B, A]], "rank 1 waits in exchange 0 of 2"),
    "another operation": ([[A], [exchange(op="sum")]], "all_to_all and sum"),
    "another size": ([[A], [exchange(received=[3, 4])]], "from 0 to 1: 4 are sent, 3 awaited"),
    "nobody awaits": (
        [[pair((0, 1), [0, 4], [0, 0])], [pair((0, 1), [0, 0], [0, 0])]],
        "4 are sent, 0 awaited",
    ),
    "a circle": (
        [
            [exchange(ranks=(0, 1)), exchange(ranks=(0, 2))],
            [exchange(ranks=(1, 2)), exchange(ranks=(0, 1))],
            [exchange(ranks=(0, 2)), exchange(ranks=(1, 2))],
        ],
        "rank 2 waits in exchange 0",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_found(name: str) -> None:
    ranks, text = MISFITS[name]
    assert any(text in found for found in misfits(ranks))


@pytest.mark.parametrize(
    ("tensor", "text"),
    [(["cpu", True, 8], "cpu"), ([CARD, False, 8], "contiguous: False"), ([CARD, True, 9], "9")],
)
def test_tensors_that_nccl_cannot_take_are_found(tensor: list[Any], text: str) -> None:
    assert misplaced([exchange()], CARD) == []
    (found,) = misplaced([exchange(), exchange(tensors=[[CARD, True, 8], tensor])], CARD)
    assert found.startswith("1: ")
    assert text in found
