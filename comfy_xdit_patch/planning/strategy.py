"""What ``XDIT_STRATEGY`` asks for: a name, or the degrees of a plan.

Runs in: host and worker (and the command line). Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from comfy_xdit_patch.planning.grid import AXES, Degrees

FREE = ("auto", "fsdp")
"""Names that leave the axes to us."""
AXES_OF: dict[str, tuple[str, ...]] = {
    **{axis: (axis,) for axis in ("ulysses", "ring", "batch", "tensor", "pipefusion")},
    "usp": ("ulysses", "ring"),
}
"""The axes that the ranks share under the other names, and no others."""
WEIGHTS = ("fsdp", "modulation")
"""How the weights of all ranks are shared, beside the axes."""
NAMES = ("auto", "ulysses", "ring", "usp", "batch", "tensor", "fsdp", "pipefusion", "off")
ALIASES = {"cfg": "batch"}
LEGAL = (
    "auto, ulysses, ring, usp, batch (or cfg), tensor, fsdp, pipefusion (approximate), off, or a "
    "plan such as batch=2,ulysses=2,tensor=2, ulysses=4,fsdp=4 or ulysses=4,modulation=4"
)
PLAN = "plan"

Balancing = Literal["even", "weighted", "adaptive", "least_loaded"]
"""What ``XDIT_BALANCE`` may be."""
BALANCING: tuple[Balancing, ...] = get_args(Balancing)


@dataclass(frozen=True, slots=True)
class Strategy:
    """One of ``NAMES``, or ``plan``: then the degrees are those that the user wrote.

    ``fsdp`` is over how many ranks a plan shards the weights, ``modulation`` over how many it
    shares those that modulate the blocks; 0 for as memory asks.
    """

    name: str
    degrees: Degrees = field(default_factory=Degrees)
    fsdp: int = 0
    modulation: int = 0

    @property
    def first_mode(self) -> Literal["full", "modulation", "sharded"]:
        """How ranks are to hold the weights, room or not, if that mode or none before it fits."""
        if self.name == "fsdp" or self.fsdp:
            return "sharded"
        return "modulation" if self.modulation else "full"

    def __str__(self) -> str:
        if self.name != PLAN:
            return self.name
        parts = [f"{name}={getattr(self, name)}" for name in WEIGHTS if getattr(self, name)]
        return ",".join([*self.degrees.parts, *parts]) or "ulysses=1"


AUTO = Strategy("auto")


def parse_strategy(value: str) -> Strategy:
    """Parse ``XDIT_STRATEGY``. Whether a plan fits the ranks is the planner's to say.

    Raises:
        ValueError: the value is not ``LEGAL``.
    """
    text = value.strip().lower()
    name = ALIASES.get(text, text)
    if name in NAMES:
        return Strategy(name)
    degrees: dict[str, int] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([1-9]\d{0,2})\s*", item)
        axis = ALIASES.get(match[1], match[1]) if match else ""
        if match is None or axis not in {*AXES, *WEIGHTS} or axis in degrees:
            raise ValueError(value)
        degrees[axis] = int(match[2])
    if len(degrees) == 1 and degrees.keys() < {*WEIGHTS}:
        (degrees["ulysses"],) = degrees.values()
    shared = {name: degrees.pop(name, 0) for name in WEIGHTS}
    return Strategy(PLAN, Degrees(**degrees), **shared)
