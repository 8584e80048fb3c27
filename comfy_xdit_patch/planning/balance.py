"""Weights of unequal ranks: learned from what each rank was busy for, changed only for a gain.

Runs in: host. Pure: numbers in, weights out; ``host/pace/rank_speeds.py`` knows pool, runs and
devices.

A rank's speed is its part of a call's work over its busy seconds. Speeds of single calls are noisy,
and shares that follow noise are worse than even ones. So a change must promise a gain, computed
with the shares as they would really be (whole tokens, heads and rows), beyond the noise: a large
one after a few calls, a small one after many. After every change more calls are asked for, and a
change that did not help is taken back.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from statistics import fmean, median

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.family import HEAD_WIDTH
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload
from comfy_xdit_patch.planning.sequence_shares import DAMPING, moved_weights, normal
from comfy_xdit_patch.planning.strategy import Balancing

REMEMBERED_CALLS = 64


MIN_GAIN = 0.04
"""Part of a call's time that a change must save: 4 % is what ranks that differ by 8 % lose."""
LARGE_GAIN = 0.12
NUM_ERRORS = 2.0
"""How many standard errors of the slowest rank's speed a gain must promise beyond its least."""
ERROR_PER_DEVIATION = 1.4826 * 1.2533
"""Of normal noise: from the median deviation to the standard one, and from the error of a mean to
that of a median."""
EVEN_RATIO = 1.05
"""Weights closer to each other than this are even."""
NOTABLE = 0.1
"""Part of a device that other programs must take or give back before weights follow it."""
MAX_RATIO = 100.0
"""Busy seconds of ranks that are further apart than this are no measurement."""
SCALE = 1000
"""The largest weight, as a whole number."""
REMEMBERED_KINDS = 64


@lru_cache(maxsize=REMEMBERED_CALLS)
def work_parts(plan: ParallelPlan, workload: Workload) -> tuple[float, ...]:
    """Every rank's part of a call's work: its rows, tokens and heads.

    Attention is ``4 S^2 D`` of ``4 S^2 D + 24 D^2 S`` FLOPs in a block; the rest goes by tokens.
    """
    num_tokens = workload.num_tokens
    attention = num_tokens / (6 * HEAD_WIDTH * workload.num_heads + num_tokens)
    parts = []
    for rank in range(plan.world_size):
        first, end = plan.batch_rows(rank, workload.batch_size)
        shares = plan.shares_of_call(rank, workload)
        place = plan.sequence_index(rank)
        ring_place, near = divmod(place, plan.ulysses)
        start = ring_place * plan.ulysses
        queries = sum(shares.joint[start : start + plan.ulysses])
        linear = (1 - attention) * shares.joint[place] / num_tokens
        heads = attention * queries / num_tokens * shares.heads[near] / workload.num_heads
        parts.append((end - first) / workload.batch_size * (linear + heads))
    return tuple(parts)


FEW_CALLS, MANY_CALLS, MOST_CALLS = 3, 5, 40
"""Calls that a large and a small gain must be seen in at least, and how many are remembered."""


Replan = Callable[[tuple[int, ...]], ParallelPlan | Refusal]
"""The plan that a call would have with other weights."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """What the weights were before a change, and how uneven the ranks were with them."""

    weights: tuple[int, ...]
    unevenness: float
    is_small: bool


class Balance:
    """The weights of one crew of ranks."""

    def __init__(self, mode: Balancing, num_ranks: int) -> None:
        self._mode = mode
        self._num_ranks = num_ranks
        self._is_settled = mode == "even" or num_ranks == 1
        self._kinds: OrderedDict[Hashable, None] = OrderedDict()
        self._speeds: deque[tuple[float, ...]] = deque(maxlen=MOST_CALLS)
        self._unevenness: deque[float] = deque(maxlen=MANY_CALLS)
        self._calls_for_large, self._calls_for_small = FEW_CALLS, MANY_CALLS
        self._trial: _Trial | None = None
        self._left_over = (1.0,) * num_ranks
        self.weights: tuple[int, ...] = ()
        """Relative speed of every rank; none while all are taken to be equal."""
        self.num_changes = 0

    def measured(
        self,
        plan: ParallelPlan,
        workload: Workload,
        busy_s: Sequence[float],
        *,
        kind: Hashable,
        replan: Replan,
    ) -> bool:
        """Learn from a call; return whether the weights changed.

        Args:
            plan: of the call.
            busy_s: of every rank.
            kind: calls of another kind take another time. The first of its kind is not counted: it
                makes groups, kernels and memory ready.
        """
        if self._is_settled or self._is_first((kind, plan)) or not _is_measurement(busy_s):
            return False
        work = normal(work_parts(plan, workload))
        self._speeds.append(normal([w / s for w, s in zip(work, busy_s, strict=True)]))
        self._unevenness.append(max(busy_s) * len(busy_s) / sum(busy_s))
        if self._mode == "weighted":
            if len(self._speeds) < MANY_CALLS:
                return False
            self._is_settled = True
            return self._change(as_weights(self._estimate(MANY_CALLS)[0]))
        if self._has_failed():
            return True
        for num_calls, latest, least, damping in (
            (self._calls_for_large, self._calls_for_large, LARGE_GAIN, 1.0),
            (self._calls_for_small, MOST_CALLS, MIN_GAIN, DAMPING),
        ):
            if len(self._speeds) < num_calls:
                continue
            speeds, error = self._estimate(latest)
            least += NUM_ERRORS * error
            if 1 - 1 / _longest(work, speeds) < least:
                continue  # Not even perfect shares would gain that.
            target = as_weights(moved_weights(self._ratios, speeds, damping=1.0))
            if _gain(speeds, workload, replan(self.weights), replan(target)) < least:
                continue
            weights = as_weights(moved_weights(self._ratios, speeds, damping=damping))
            if weights == self.weights:
                continue
            is_small = latest == MOST_CALLS
            self._trial = _Trial(self.weights, median(self._unevenness), is_small)
            self._calls_for_large = min(self._calls_for_large + 1, MANY_CALLS)
            if is_small:
                self._calls_for_small = min(self._calls_for_small * 2, MOST_CALLS)
            return self._change(weights)
        return False

    @property
    def is_at_rest(self) -> bool:
        """Whether enough calls were measured since the last change to see a large gain."""
        if self._is_settled or self._mode == "weighted":
            return self._is_settled
        return len(self._speeds) >= self._calls_for_large

    def follow(self, left_over: Sequence[float]) -> bool:
        """Scale weights by what other programs leave of each device; return whether they changed.

        Args:
            left_over: part of every rank's device that other programs do not use, above 0 to 1.
        """
        before = self._left_over
        if max(abs(a - b) for a, b in zip(left_over, before, strict=True)) < NOTABLE:
            return False
        self.learned_under(left_over)
        self._trial = None
        scaled = zip(self._ratios, left_over, before, strict=True)
        return self._change(as_weights([ratio * now / then for ratio, now, then in scaled]))

    def learned_under(self, left_over: Sequence[float]) -> None:
        """Note what other programs left of the devices when these weights were measured."""
        self._left_over = tuple(left_over)

    @property
    def _ratios(self) -> tuple[int, ...]:
        return self.weights or (1,) * self._num_ranks

    def _has_failed(self) -> bool:
        """Take the last change back if the ranks are no more even than they were before it.

        The arithmetic of work is not exact: with few heads on each rank, a head more or less may
        weigh more than it says. What failed on a small scale is not tried again.
        """
        if self._trial is None or len(self._unevenness) < MANY_CALLS:
            return False
        trial, self._trial = self._trial, None
        if median(self._unevenness) < trial.unevenness:
            return False
        if trial.is_small:
            self._calls_for_small = MOST_CALLS + 1
        return self._change(trial.weights)

    def _change(self, weights: tuple[int, ...]) -> bool:
        if weights == self.weights:
            return False
        self.weights = weights
        self.num_changes += 1
        self._speeds.clear()
        self._unevenness.clear()
        return True

    def _is_first(self, kind: Hashable) -> bool:
        is_first = kind not in self._kinds
        self._kinds[kind] = None
        self._kinds.move_to_end(kind)
        if len(self._kinds) > REMEMBERED_KINDS:
            self._kinds.popitem(last=False)
        return is_first

    def _estimate(self, num_calls: int) -> tuple[tuple[float, ...], float]:
        """Speeds as medians over the latest calls, and the largest standard error among them."""
        by_rank = list(zip(*list(self._speeds)[-num_calls:], strict=True))
        medians = normal([median(of_rank) for of_rank in by_rank])
        return medians, max(_relative_error(of_rank) for of_rank in by_rank)


def as_weights(speeds: Sequence[float]) -> tuple[int, ...]:
    """Round to whole numbers; none if all are about equal."""
    if max(speeds) <= EVEN_RATIO * min(speeds):
        return ()
    return tuple(max(1, round(SCALE * speed / max(speeds))) for speed in speeds)


def _gain(
    speeds: Sequence[float],
    workload: Workload,
    old: ParallelPlan | Refusal,
    new: ParallelPlan | Refusal,
) -> float:
    """Part of the time of an old plan that a new one saves."""
    if isinstance(old, Refusal) or isinstance(new, Refusal):
        return 0.0
    before, after = (_longest(work_parts(plan, workload), speeds) for plan in (old, new))
    return 1 - after / before


def _longest(work: Sequence[float], speeds: Sequence[float]) -> float:
    """Time of the rank that takes longest; 1 if all ranks take equally long."""
    return max(part / speed for part, speed in zip(work, speeds, strict=True))


def _relative_error(values: Sequence[float]) -> float:
    """Standard error of a median, over that median: a few disturbed calls do not count.

    Of few values it is the mean's: two may agree by chance. (``statistics.stdev`` takes longer.)
    """
    if len(values) >= MANY_CALLS:
        middle = median(values)
        deviation = median(abs(value - middle) for value in values)
        return ERROR_PER_DEVIATION * deviation / sqrt(len(values)) / middle
    mean = fmean(values)
    squares = sum((value - mean) ** 2 for value in values)
    return sqrt(squares / (len(values) - 1) / len(values)) / mean


def _is_measurement(busy_s: Sequence[float]) -> bool:
    return min(busy_s) > 0 and max(busy_s) <= MAX_RATIO * min(busy_s)
