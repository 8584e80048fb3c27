"""The table of issue "every graph people run": each row is a graph and what becomes of it.

Runs in: the tests (standard library only).

All rows stand in ``feature_table``; what they become is written into docs/compatibility.md by a run
of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rig.feature_graphs import STEPS, Draft
from rig.graphs import Graph
from rig.trees import Need, Tree

PARALLEL, GATHERED, FALLS_BACK = "parallel", "parallel with gather", "falls back"
UNSEEN = "not seen"  # the model ran, and none of its calls reached us
REFUSED = "ComfyUI refuses it"  # stock ComfyUI fails, and so does ours, in the same words
NOT_HERE = "not in this version"


@dataclass(frozen=True)
class Row:
    """One thing that graphs do.

    Attributes:
        change: makes the graph, starting from the plain one.
        outcome: what the sampling steps become; ``PARALLEL``, ``GATHERED``, ``FALLS_BACK``,
            ``UNSEEN`` or ``REFUSED``.
        reason: a part of the reason that the log gives for falling back, or of ComfyUI's error.
        why: why it falls back, or another remark, for the page.
        control_alone: a part of the reason why ComfyUI computes the ControlNet itself.
        needs: a file of ComfyUI and a text in it, without which this version has no such thing.
        same_as_plain: why the image may equal the plain one; without it, it must differ visibly.
        is_rounded: whether the model computes in 16 bits, so that the order of sums shows.
        is_slow: takes minutes; runs only where FEATURES_SLOW is set.
        pack: a node pack that changes all graphs and therefore gets servers of its own.
    """

    change: Callable[[Draft], None]
    outcome: str = PARALLEL
    reason: str = ""
    why: str = ""
    control_alone: str = ""
    needs: Need | None = None
    same_as_plain: str = ""
    is_rounded: bool = False
    is_slow: bool = False
    pack: str | None = None
    size: tuple[int, int] = (128, 128)
    steps: int = STEPS

    def __post_init__(self) -> None:
        if self.outcome in (FALLS_BACK, REFUSED) and not self.reason:
            raise ValueError(f"{self.outcome!r} needs a reason: without one, any would do.")
        if self.outcome in (UNSEEN, REFUSED) and not self.why:
            raise ValueError(f"{self.outcome!r} says why, as nothing else does on the page.")

    def graph(self) -> Graph:
        """Return the graph in ComfyUI's API format."""
        draft = Draft(self.size, self.steps)
        self.change(draft)
        return draft.finished()

    def runs_on(self, tree: Tree) -> bool:
        """Whether this version of ComfyUI has what the row is about."""
        return tree.has(self.needs)


def plain(_: Draft) -> None:
    """Change nothing."""


PACKS = Path(__file__).with_name("node_packs")
