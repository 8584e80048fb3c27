"""The CPU's time for a forward whose kernels take none: ComfyUI alone, and the first of some ranks.

Runs in: the rig's environment; ComfyUI is a process of its own.

FLUX.1 at its true size on torch's device ``meta``, which computes nothing; an exchange begins and
ends at once. What is left is Python and torch's dispatch, which takes longer there than for a GPU.
"""

from __future__ import annotations

from bench.rows import Row, compared
from inside.client import Inside
from rig.trees import Tree

RANKS = (2, 4, 8)
CALL = {"blocks": [19, 38], "text": 256}


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """A forward on the first of so many ranks, against ComfyUI alone."""
    process = Inside(tree, {"XDIT_STRATEGY": "off"})
    try:
        found = process.call(
            "counted_calls:seconds", ranks=[1, *RANKS], rounds=3 if is_quick else 9, **CALL
        )
    finally:
        process.close()
    times = {int(ranks): [1000 * one for one in of_ranks] for ranks, of_ranks in found.items()}
    name = "the CPU's time for a forward of FLUX.1: on the first of {} ranks against ComfyUI alone"
    return [compared(name.format(ranks), "ms", times[ranks], times[1]) for ranks in RANKS]
