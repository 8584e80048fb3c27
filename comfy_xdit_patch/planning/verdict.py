"""Several ranks or one: what was measured for one kind of call, and what follows.

Runs in: host (and the command line). Pure: seconds in, the next thing to do out.

    several, several, several | one, one, one | the faster of the two, from then on
                                              | several, several: in doubt, where one was faster

The first step of each three warms up (weights, kernels, groups) and does not count. A run that
ends in between is continued by the next one. What took the machine from the first three may be over
by then, and a wrong verdict against them would never be seen again; one for them is watched.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from math import log2

from comfy_xdit_patch.planning.plan import Workload

NUM_TIMED = 2
"""Steps of each kind that count; the fastest is taken, for what disturbs a step only slows it."""
CLASSES_PER_DOUBLING = 4
"""Sizes of call that count as one: tokens within 19 %."""
NUM_WATCHED = 5
"""Steps whose median tells that several ranks are not what they were."""


class Way(enum.Enum):
    """How a step is to be computed."""

    SEVERAL = "several"
    ONE = "one"
    """In ComfyUI's own process, and timed."""
    NOT_SEVERAL = "not several"
    """In ComfyUI's own process, for the rest of the run."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Seconds of one step, measured: all ranks by a plan, and ComfyUI alone."""

    plan: str
    several_s: float
    one_s: float

    @property
    def is_several(self) -> bool:
        """Whether all ranks together are faster."""
        return self.several_s < self.one_s

    @property
    def speedup(self) -> float:
        """How many times as fast as one the ranks are."""
        return self.one_s / self.several_s


@dataclass(slots=True)
class Trial:
    """The measurements of one kind of call under one plan."""

    plan: str
    several: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_WATCHED))

    def way(self) -> Way:
        """How the next step is to be computed."""
        if self.verdict is not None:
            return Way.SEVERAL if self.verdict.is_several else Way.NOT_SEVERAL
        is_ones_turn = len(self.several) > NUM_TIMED and len(self.one) <= NUM_TIMED
        return Way.ONE if is_ones_turn else Way.SEVERAL

    def took(self, seconds: float, *, is_several: bool) -> Verdict | None:
        """Note a step that took so long. Returns a verdict when it is reached."""
        if self.verdict is not None:
            if is_several:
                self._watch(seconds, self.verdict)
            return None
        (self.several if is_several else self.one).append(seconds)
        if min(len(self.several), len(self.one)) <= NUM_TIMED:
            return None
        verdict = Verdict(self.plan, min(self.several[1:]), min(self.one[1:]))
        if verdict.is_several or len(self.several) > 2 * NUM_TIMED:
            self.verdict = verdict
        return self.verdict

    def _watch(self, seconds: float, verdict: Verdict) -> None:
        """Begin again when the ranks have become slower than one rank was."""
        self._recent.append(seconds)
        ordered = sorted(self._recent)
        if len(ordered) == NUM_WATCHED and ordered[NUM_WATCHED // 2] > verdict.one_s:
            self.verdict = None
            self.several, self.one = ordered[:1] * (NUM_TIMED + 1), []
            self._recent.clear()


def size_class(workload: Workload) -> str:
    """Name the sizes of call that take about as long: rows, and the class of tokens in each."""
    tokens = workload.num_text_tokens + workload.num_image_tokens + workload.num_reference_tokens
    exponent = round(CLASSES_PER_DOUBLING * log2(tokens)) / CLASSES_PER_DOUBLING
    return f"{workload.batch_size} x 2^{exponent:g} tokens"
