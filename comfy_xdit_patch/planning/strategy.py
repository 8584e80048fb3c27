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
NAMES = ("auto", "ulysses", "ring", "usp", "batch", "tensor", "fsdp", "pipefusion", "off")
ALIASES = {"cfg": "batch"}
LEGAL = (
    "auto, ulysses, ring, usp, batch (or cfg), tensor, fsdp, pipefusion (approximate), off, or a "
    "plan such as batch=2,ulysses=2,tensor=2 or ulysses=4,fsdp=4"
)
PLAN = "plan"

Balancing = Literal["even", "weighted", "adaptive", "least_loaded"]
"""What ``XDIT_BALANCE`` may be."""
BALANCING: tuple[Balancing, ...] = get_args(Balancing)


@dataclass(frozen=True, slots=True)
class Strategy:
    """One of ``NAMES``, or ``plan``: then the degrees are those that the user wrote.

    ``fsdp`` is over how many ranks a plan shards the weights, 0 for as memory asks.
    """

    name: str
    degrees: Degrees = field(default_factory=Degrees)
    fsdp: int = 0

    @property
    def shards_weights(self) -> bool:
        """Whether the weights are to be sharded, room or not."""
        return self.name == "fsdp" or self.fsdp > 0

    def __str__(self) -> str:
        if self.name != PLAN:
            return self.name
        fsdp = [f"fsdp={self.fsdp}"] if self.fsdp else []
        return ",".join([*self.degrees.parts, *fsdp]) or "ulysses=1"


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
        if match is None or axis not in {*AXES, "fsdp"} or axis in degrees:
            raise ValueError(value)
        degrees[axis] = int(match[2])
    if degrees.keys() == {"fsdp"}:
        degrees["ulysses"] = degrees["fsdp"]
    fsdp = degrees.pop("fsdp", 0)
    return Strategy(PLAN, Degrees(**degrees), fsdp)
