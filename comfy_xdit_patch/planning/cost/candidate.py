"""One way to share the work, all ways there are, and those that a user may ask for.

Runs in: the command line's process.

A user asks for a strategy by name, or for a plan by its degrees. ``grid.py`` says which ranks share
an axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from comfy_xdit_patch.planning.grid import AXES, Degrees
from comfy_xdit_patch.planning.residency import Mode
from comfy_xdit_patch.planning.strategy import AXES_OF, FREE, NAMES, PLAN, parse_strategy

EXACT = frozenset({"batch", "ulysses", "ring"})
"""Axes that share rows and tokens, whose image is one GPU's, up to rounding; ``auto`` takes no
others. Cutting weights (``tensor``) is as exact, and used by name."""
NAMED = tuple(name for name in NAMES if name != "off")
STRATEGY_LEGAL = (
    f"single, {', '.join(NAMED)}, or a plan such as batch=2,ulysses=2: degrees of "
    f"{', '.join(AXES)}, and fsdp=N, modulation=N or offload=N for the weights of all N ranks"
)

WEIGHTS: dict[Mode, str] = {"modulation": "modulation", "sharded": "fsdp", "offload": "offload"}
"""Where weights lie that are not whole on every card, and how users write it."""


@dataclass(frozen=True, slots=True)
class Candidate(Degrees):
    """Degrees of every axis, and where the weights lie."""

    weights: Mode = field(default="full", kw_only=True)

    @property
    def name(self) -> str:
        """As users write and read it, e.g. ``batch=2,ulysses=2,fsdp=4``."""
        word = WEIGHTS.get(self.weights)
        weights = [] if word is None else [f"{word}={self.world_size}"]
        return ",".join([*self.parts, *weights]) or "single"


SINGLE = Candidate()


def candidates(max_world_size: int) -> Iterator[Candidate]:
    """Every combination of degrees of up to that many ranks, and every place of the weights.

    Weights that are split by stage or by column are not sharded besides: two ways to the same end.
    One GPU has no such choice: ComfyUI itself keeps in CPU memory what does not fit.
    """
    for world_size in range(1, max_world_size + 1):
        for degrees in _factorings(world_size, len(AXES)):
            plain = Candidate(*degrees)
            yield plain
            if world_size > 1 and plain.pipefusion == plain.tensor == 1:
                for weights in WEIGHTS:
                    yield Candidate(*degrees, weights=weights)


def _factorings(number: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    if num_factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorings(number // first, num_factors - 1):
                yield (first, *rest)


@dataclass(frozen=True, slots=True)
class Asked:
    """``text`` as the user wrote it. ``plan`` is set where the degrees are given."""

    text: str = "auto"
    plan: Candidate | None = None

    def allows(self, plan: Candidate) -> bool:
        """Whether a plan is what was asked for. One GPU is part of ``auto`` only."""
        if self.plan is not None:
            return plan == self.plan
        if self.text in FREE:
            is_as_asked = self.text != "fsdp" or plan.weights == "sharded"
            return is_as_asked and EXACT.issuperset(plan.axes)
        return set(plan.axes) == set(AXES_OF[self.text])


def is_built(plan: Candidate) -> bool:
    """Whether the engine can follow a plan: in a pipeline stage there is no ring, and no tensor."""
    return plan.pipefusion == 1 or plan.ring * plan.tensor == 1


def parse_asked(text: str) -> Asked:
    """Read what ``XDIT_STRATEGY`` takes, and besides ``single`` and ``offload=N``.

    Raises:
        ValueError: it is neither; ``STRATEGY_LEGAL`` says what is.
    """
    word = text.lower().replace(" ", "")
    if word == "single":
        return Asked(word, SINGLE)
    try:
        # Both say where the weights of all ranks lie, and a plan has one of them.
        strategy = parse_strategy(word.replace("offload=", "fsdp="))
    except ValueError:
        raise ValueError(text) from None
    if strategy.name in NAMED:
        return Asked(strategy.name)
    plan = Candidate(
        *strategy.degrees.grid,
        weights="offload" if "offload=" in word else strategy.first_mode,
    )
    is_split_already = plan.pipefusion > 1 or plan.tensor > 1
    sharers = [degree for degree in (strategy.fsdp, strategy.modulation) if degree]
    if strategy.name != PLAN or (sharers and (sharers != [plan.world_size] or is_split_already)):
        raise ValueError(text)
    return Asked(plan.name, plan)
