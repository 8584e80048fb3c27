"""What one forward of FLUX.1 asks of torch, on one rank and on the first of several by ulysses.

A CPU thread issues calls one by one, and sets the pace where the GPU is done with a kernel before
the next one is there. The numbers are exact, so that a change to them is seen; whoever makes one
writes the new number here. Those of one rank are ComfyUI's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from inside.client import Inside
from rig.trees import Tree

from comfy_xdit_patch.planning.cost.model_shape import CALLS_BESIDE_GRAPH, EAGER

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"

NUM_DOUBLE, NUM_SINGLE, WIDTH = 19, 38, 3072
VALUE_BYTES = 2
TEXT_TOKENS = 512

Counts = tuple[int, int, int]
"""Calls of torch's operators, those among them that are kernels, and the copies among those."""
# By ComfyUI's version: of a double block, of a single one, and of everything outside of both.
STOCK: dict[str, tuple[Counts, Counts, Counts]] = {
    "0.3.75": ((80, 51, 6), (44, 23, 4), (130, 91, 18)),
    "0.33.0": ((60, 43, 4), (24, 15, 2), (130, 91, 18)),
}
# What a double block, a single one and the rest have beside those, on any number of ranks.
AT_ONCE: tuple[Counts, Counts, Counts] = ((13, 2, 2), (13, 2, 2), (15, 4, 4))
# Where something is computed while tokens are exchanged. A single block's first linear is two; the
# heads are exchanged in two halves, which among 8 ranks would be too little work.
IN_HALVES: tuple[Counts, Counts, Counts] = ((35, 5, 4), (42, 6, 4), (15, 4, 4))
ADDED = {2: IN_HALVES, 4: IN_HALVES, 8: ((13, 2, 2), (20, 3, 2), (15, 4, 4))}
SEVERAL = (2, 4, 8)
EXCHANGES = {"double": 2, "single": 2, "outside": 1}
"""Beside the calls: an exchange is one more, and a kernel. In halves there are two for each."""
NUM_ARGUMENTS, MOVED = 5, 3
"""Of FLUX.1's forward; and what crosses each time, graph or not: x, the time step, the result."""
# The sum over all blocks, in 0.33.0.
HALVED = (4458, 1805, 402)
WHOLE = {1: (2182, 1478, 170), 2: HALVED, 4: HALVED, 8: (3204, 1634, 288)}


def counted(process: Inside, num_ranks: int, **how: object) -> dict[str, list[int]]:
    """Count by ``inside/counted_calls.py``: a double block, a single one, and outside of both."""
    call = process.call("counted_calls:calls", num_ranks=num_ranks, text=TEXT_TOKENS, **how)
    return dict(call)


def test_a_forward_makes_these_calls_and_no_other(
    tree: Tree, inside: Callable[..., Inside], record_property: Callable[[str, object], None]
) -> None:
    process = inside(tree, XDIT_STRATEGY="off")
    stock = counted(process, 1)
    record_property(f"{tree.version}, 1 rank", stock)
    assert [counts.pop() for counts in stock.values()] == [0, 0, 0]
    if tree.version in STOCK:
        assert [tuple(counts) for counts in stock.values()] == list(STOCK[tree.version])
    for num_ranks in SEVERAL:
        for overlaps, expected in ((False, AT_ONCE), (True, ADDED[num_ranks])):
            found = counted(process, num_ranks, overlaps=overlaps)
            record_property(f"{tree.version}, {num_ranks} ranks", found)
            halves = 2 if expected is IN_HALVES else 1
            exchanges = {name: counts.pop() for name, counts in found.items()}
            assert exchanges == {
                name: n if name == "outside" else n * halves for name, n in EXCHANGES.items()
            }
            added = {
                name: tuple(now - before for now, before in zip(counts, stock[name], strict=True))
                for name, counts in found.items()
            }
            assert added == dict(zip(found, expected, strict=True)), (num_ranks, overlaps)


def test_the_model_of_cost_counts_the_same_calls() -> None:
    double, single, _ = (of_ranks[0] for of_ranks in AT_ONCE)
    assert double == single == EAGER.calls_per_attention - EXCHANGES["double"]
    later, halved = (
        [now[0] - before[0] for now, before in zip(added, AT_ONCE, strict=True)]
        for added in (ADDED[8], IN_HALVES)
    )
    assert later == [0, EAGER.calls_per_later_columns, 0]
    halves = EAGER.calls_per_halves - EXCHANGES["double"]
    assert halved == [halves, halves + EAGER.calls_per_later_columns, 0]


@pytest.mark.newest_only
def test_shared_modulation_adds_these_calls_once_a_forward(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    process = inside(tree, XDIT_STRATEGY="off")
    for num_ranks in SEVERAL:
        whole, shared = (
            counted(process, num_ranks, shares_modulation=is_shared) for is_shared in (False, True)
        )
        added = {
            name: tuple(now - before for now, before in zip(shared[name], whole[name], strict=True))
            for name in whole
        }
        # The first block asks for all: the single block's linear is called in it.
        calls = EAGER.calls_per_shared_modulation
        assert sum(counts[0] for counts in added.values()) == calls, added
        assert sum(counts[3] for counts in added.values()) == 1, "one exchange"
        assert added["outside"] == (0, 0, 0, 0)


@pytest.mark.newest_only
@pytest.mark.parametrize("transfer_dtype", ["int8", "fp8"])
def test_transfers_in_8_bits_add_these_calls_and_no_exchange(
    tree: Tree, inside: Callable[..., Inside], transfer_dtype: str
) -> None:
    process = inside(tree, XDIT_STRATEGY="off")
    for num_ranks in SEVERAL:
        exact, narrow = (
            counted(process, num_ranks, transfer_dtype=dtype) for dtype in ("exact", transfer_dtype)
        )
        num_exchanges = 4 if ADDED[num_ranks] is IN_HALVES else 2
        for block in ("double", "single"):
            assert narrow[block][3] == exact[block][3] == num_exchanges
            added = narrow[block][0] - exact[block][0]
            assert added == num_exchanges * EAGER.calls_per_quantised, (block, num_ranks)
        assert narrow["outside"] == exact["outside"]


@pytest.mark.newest_only
def test_a_forward_that_is_a_graph_copies_its_arguments_and_launches_that(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    process = inside(tree, XDIT_STRATEGY="off")
    for num_ranks in SEVERAL:
        found = process.call("counted_calls:captured", num_ranks=num_ranks, text=TEXT_TOKENS)
        calls, kernels, copies, exchanges, launches = found["replayed"]
        assert calls == kernels == copies == NUM_ARGUMENTS, "x, time step, text, y and guidance"
        assert (exchanges, launches) == (0, 1), "what is exchanged lies in the graph"
        assert calls + MOVED + launches == CALLS_BESIDE_GRAPH
        assert found["first"][0] > 100
        assert found["captured"][-1] == 1, "it is compared once"


@pytest.mark.parametrize("num_ranks", WHOLE)
def test_the_table_of_whole_forwards_is_the_sum_of_its_parts(num_ranks: int) -> None:
    added = ADDED.get(num_ranks, ((0, 0, 0),) * len(AT_ONCE))
    numbers = (NUM_DOUBLE, NUM_SINGLE, 1)
    whole = [0, 0, 0]
    for number, stock, more in zip(numbers, STOCK["0.33.0"], added, strict=True):
        whole = [w + number * (s + m) for w, s, m in zip(whole, stock, more, strict=True)]
    assert tuple(whole) == WHOLE[num_ranks]


def test_the_page_has_these_counts() -> None:
    for num_ranks, overlapped in WHOLE.items():
        cells = [str(num_ranks)]
        ways = (AT_ONCE, ADDED[num_ranks]) if num_ranks > 1 else (((0, 0, 0),) * 3,)
        of_parts = zip(*(STOCK["0.33.0"], *ways), strict=True)
        blocks = [[stock[0] + more[0] for more in added] for stock, *added in of_parts]
        numbers = (NUM_DOUBLE, NUM_SINGLE, 1)
        sums = [
            sum(n * found for n, found in zip(numbers, of_way, strict=True))
            for of_way in zip(*blocks, strict=True)
        ]
        assert sums[-1] == overlapped[0]
        for counts in (*blocks[:2], sums):
            cells += map(str, counts) if num_ranks > 1 else (str(counts[0]), "")
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in PAGE.read_text(), cells


@pytest.mark.newest_only
def test_a_rank_of_n_holds_and_reads_an_nth_of_the_modulation(
    tree: Tree, inside: Callable[..., Inside]
) -> None:
    process, page = inside(tree, XDIT_STRATEGY="off"), PAGE.read_text()
    outputs = (12 * NUM_DOUBLE + 3 * NUM_SINGLE) * WIDTH
    for num_ranks in WHOLE:
        found = process.call(
            "counted_calls:modulation",
            num_ranks=num_ranks,
            blocks=[NUM_DOUBLE, NUM_SINGLE],
            text=TEXT_TOKENS,
        )
        held = VALUE_BYTES * outputs * (WIDTH + 1) // num_ranks
        sent = VALUE_BYTES * outputs // num_ranks * (num_ranks - 1)
        assert found == {"held": held, "read": held, "sent": sent}
        assert f"| {num_ranks} | {held:,} | {held:,} | {sent:,} |" in page
