"""Whether what all ranks exchange fits together, from what each of them noted (``fake_exchange``).

NCCL asks this much and checks nothing of it: ranks that begin other exchanges than their partners,
or in another order, wait for ever; sizes that differ write where they should not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Exchange = dict[str, Any]


def misfits(ranks: Sequence[Sequence[Exchange]]) -> list[str]:
    """Let all ranks go on, each waiting in every exchange for its partners; say what is wrong.

    Stricter than NCCL, which lets a rank go on where it does not wait: ranks that pass here have
    one order of all exchanges in all groups.
    """
    places = [0] * len(ranks)
    found: list[str] = []

    def present(rank: int) -> Exchange | None:
        return ranks[rank][places[rank]] if places[rank] < len(ranks[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(len(ranks)):
            mine = present(rank)
            if mine is None:
                continue
            theirs = [present(other) for other in mine["with"]]
            met = [t for t in theirs if t is not None and _name(t) == _name(mine)]
            if len(met) == len(theirs):
                found += _unequal(met)
                for other in mine["with"]:
                    places[other] += 1
                moved = True
    for rank, exchanges in enumerate(ranks):
        if (waits := present(rank)) is not None:
            found.append(
                f"rank {rank} waits in exchange {places[rank]} of {len(exchanges)}: "
                f"{waits['op']} of {_name(waits)}"
            )
    return found


def misplaced(exchanges: Sequence[Exchange], device: str) -> list[str]:
    """Say which tensors of one rank's exchanges NCCL could not take."""
    found = []
    for number, exchange in enumerate(exchanges):
        for where, is_contiguous, _ in exchange["tensors"]:
            if where != device or not is_contiguous:
                found.append(f"{number}: {exchange['op']}, {where}, contiguous: {is_contiguous}")
        if exchange["op"].startswith("all_to_all"):
            sizes = [size for _, _, size in exchange["tensors"]]
            if sizes != [sum(exchange["sent"]), sum(exchange["received"])]:
                found.append(f"{number}: {exchange['op']} of {sizes} elements: {exchange}")
    return found


def _name(exchange: Exchange) -> str:
    return f"{exchange['group']} among {exchange['with']}"


def _unequal(together: Sequence[Exchange]) -> list[str]:
    """Compare what each rank sends with what its partner waits for."""
    ops = sorted({exchange["op"] for exchange in together})
    if len(ops) > 1:
        return [f"{_name(together[0])}: {' and '.join(ops)}"]
    return [
        f"{_name(mine)}: {mine['op']} from {i} to {j}: {mine['sent'][j]} are sent, "
        f"{theirs['received'][i]} awaited"
        for i, mine in enumerate(together)
        for j, theirs in enumerate(together)
        if mine["sent"][j] != theirs["received"][i]
    ]
