"""The fastest of several ways: what was measured for one kind of call, and what follows.

Runs in: host (and the command line). Pure: seconds in, the next thing to do out.

    run of 20 steps     U U  R R  1 1 | U R 1 | U R | U U U U ...
                        each way warms up, and is counted; then in turn; what is in doubt goes on

U is the usual plan, R one with a ring, 1 ComfyUI alone. Turns alternate, so that what disturbs the
machine for a while disturbs all. The first step of each way in a run warms up (weights, kernels,
groups) and does not count. A trial that a run does not finish is continued by the next one.

The fastest counted step stands for a way: what disturbs a step only slows it, so that of a few
steps the fastest is the nearest to what the way takes, and a median of three is a disturbed one
whenever two are.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import log2

from comfy_xdit_patch.planning.plan import Workload

ONE = "one"
"""ComfyUI alone, in its own process. Other ways have the names of their plans."""

FEWEST, USUAL, MOST = 2, 3, 6
"""Steps of each way that count: if it is far behind, as a rule, and while it is in doubt."""
FAR_BEHIND = 2.0
"""A way is far behind if its fastest step takes so many times what the leader's slowest takes."""
PATIENCE = 2
"""Turns in a row of which no time came: such a way is refused somewhere, and is left out."""

DAY_S = 24 * 3600.0
NUM_RUNS = 50
"""A verdict for ComfyUI alone is looked at again after a day, or after so many runs: as the ranks
do not run, nothing else would tell that they are faster by now."""
NUM_WATCHED = 5
"""Steps whose median tells that several ranks are not what they were."""

CLASSES_PER_DOUBLING = 4
"""Sizes of call that count as one: tokens within 19 %."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a way's counted steps: the fastest of them, and their median."""

    fastest_s: float
    median_s: float

    @property
    def spread(self) -> float:
        """How much longer than the fastest a step takes as a rule, as a part of it."""
        return self.median_s / self.fastest_s - 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial found.

    ``num_runs`` of this kind of call began since, counted while ComfyUI alone is taken.
    """

    paces: Mapping[str, Pace]
    unix_s: float
    num_runs: int = 0

    @property
    def taken(self) -> str:
        """The fastest way; of equals ComfyUI alone."""
        return min(self.paces, key=lambda way: (self.paces[way].fastest_s, way != ONE))

    @property
    def best_plan(self) -> str | None:
        """The fastest way of all ranks; None where none was measured."""
        plans = [way for way in self.paces if way != ONE]
        return min(plans, key=lambda way: self.paces[way].fastest_s, default=None)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as ComfyUI alone the ranks are, at their best plan."""
        plan, one = self.best_plan, self.paces.get(ONE)
        return one.fastest_s / self.paces[plan].fastest_s if plan and one else None

    def is_doubted(self, unix_s: float) -> bool:
        """Whether the ranks are to have another look. So if the clock was set back, too."""
        is_old = self.num_runs >= NUM_RUNS or not 0 <= unix_s - self.unix_s < DAY_S
        return self.taken == ONE and is_old


class Trial:
    """The measurements of one kind of call."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._counted: dict[str, list[float]] = defaultdict(list)
        self._warm: set[str] = set()
        self._unanswered: Counter[str] = Counter()

    def begin_run(self) -> None:
        """Have the next step of every way warm up."""
        self._warm.clear()

    def due(self, ways: Sequence[str], apart: Collection[str] = ()) -> str | None:
        """Return the way whose turn it is; None if all is known.

        Args:
            ways: that this call can have, the usual plan first.
            apart: those that want the weights placed otherwise. Each change loads them anew, so
                these come last, one by one, and are not called again to settle a doubt.
        """
        racing = [way for way in ways if way == ways[0] or self._unanswered[way] < PATIENCE]
        timed = sorted((w for w in racing if self._counted[w]), key=self._fastest)
        todo = [way for way in racing if self._wants(way, timed[:2], apart)]
        # Whatever was counted least; of equals one that needs no warming up in this run.
        return min(
            todo,
            key=lambda way: (
                way in apart,
                len(self._counted[way]),
                way not in self._warm,
                ways.index(way),
            ),
            default=None,
        )

    def give(self, way: str) -> None:
        """Note that a step is about to go this way."""
        self._unanswered[way] += 1

    def took(self, way: str, seconds: float) -> None:
        """Note what it took."""
        self._unanswered[way] = 0
        if way in self._warm:
            self._counted[way].append(seconds)
        self._warm.add(way)

    def verdict(self, ways: Sequence[str], unix_s: float) -> Verdict | None:
        """Return what was found of these ways; None where nothing is to be compared."""
        paces = {
            way: Pace(min(seconds), statistics.median(seconds))
            for way in ways
            if (seconds := self._counted[way])
        }
        return Verdict(paces, unix_s) if len(paces) > 1 else None

    def _fastest(self, way: str) -> float:
        return min(self._counted[way])

    def _wants(self, way: str, best: Sequence[str], apart: Collection[str]) -> bool:
        num_counted = len(self._counted[way])
        if num_counted < FEWEST:
            return True
        leaders_slowest = max(self._counted[best[0]])
        if self._fastest(way) > FAR_BEHIND * leaders_slowest:
            return False
        if num_counted < USUAL:
            return True
        is_in_doubt = len(best) > 1 and self._fastest(best[1]) <= leaders_slowest
        return is_in_doubt and way in best and num_counted < MOST and not {*best} & {*apart}


def size_class(workload: Workload) -> str:
    """Name the sizes of call that take about as long: rows, and the class of tokens in each."""
    exponent = round(CLASSES_PER_DOUBLING * log2(workload.num_tokens)) / CLASSES_PER_DOUBLING
    return f"{workload.batch_size} x 2^{exponent:g} tokens"
