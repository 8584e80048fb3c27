"""The fault matrix: which fault, at which point, on which rank, and what must come of it.

Runs in: the rig's environment. ``shim/rig_shim_faults.py`` does what is ordered here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LOST = "a worker was lost"
NOT_STARTED = "the workers did not start"
NOT_LOADED = "a worker could not load the model"
NOT_FINITE = "the workers' result has NaN or infinity in it"
OUR_FAULT = "a fault of comfy-xdit-patch, which is in the log"

AT_START = ("start", "import", "join", "joined", "exchange")
AT_WARM_UP = ("warming", "warm")
AT_FORK = ("fork", "forked")
AT_LOAD = ("load", "patch")
IN_A_STEP = ("before", "within", "after", "reply")
EVERYWHERE = ("kill", "segv", "stop", "exception", "oom")


@dataclass(frozen=True)
class Fault:
    """One case.

    ``reasons`` are those that the steps of the prompt may fall back for; none of them means that
    all steps are parallel although the fault happened.
    """

    point: str
    kind: str
    rank: int | str
    reasons: tuple[str, ...] = (LOST,)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.point} rank {self.rank}"


def all_faults(num_ranks: int) -> list[Fault]:
    """Every point, kind and rank."""
    faults = []
    for rank in range(num_ranks):
        faults += [
            Fault(point, kind, rank, (NOT_STARTED, LOST))
            for point in AT_START
            for kind in EVERYWHERE
        ]
        faults += [
            Fault(point, kind, rank, (NOT_LOADED if kind in ("exception", "oom") else LOST,))
            for point in AT_LOAD
            for kind in EVERYWHERE
        ]
        faults += [Fault(point, kind, rank) for point in IN_A_STEP for kind in EVERYWHERE]
        faults += [Fault("unload", kind, rank, ()) for kind in EVERYWHERE]
        faults += [Fault("idle", kind, rank, (LOST,)) for kind in ("kill", "segv", "stop")]
        faults += [Fault(point, "delay", rank, ()) for point in (*AT_LOAD, *IN_A_STEP)]
        faults += [Fault("within", "hang", rank), Fault("within", "dead link", rank)]
        faults += [
            Fault("exchange", kind, rank, (NOT_STARTED, LOST)) for kind in ("hang", "other data")
        ]
        faults += [Fault("before", "nan", rank, (NOT_FINITE,))]
        faults += [Fault("reply", kind, rank) for kind in ("torn", "half", "garbage", "too long")]
    faults += [
        Fault(point, kind, "nursery", (NOT_STARTED, LOST))
        for point in (*AT_WARM_UP, *AT_FORK)
        for kind in ("kill", "segv", "stop", "exception")
    ]
    faults += [Fault("idle", kind, "nursery", (LOST,)) for kind in ("kill", "segv")]
    faults += [Fault("slot", "no space", "host", (OUR_FAULT,))]
    faults += [Fault("store", "no space", "host", (NOT_STARTED,))]
    return faults


# One of each mechanism.
SOME_FAULTS = (
    Fault("within", "segv", 1),
    Fault("within", "stop", 0),
    Fault("within", "dead link", 1),
    Fault("reply", "torn", 0),
    Fault("reply", "garbage", 1),
    Fault("before", "nan", 1, (NOT_FINITE,)),
    Fault("load", "oom", 1, (NOT_LOADED,)),
    Fault("join", "exception", 0, (NOT_STARTED, LOST)),
    Fault("exchange", "other data", 1, (NOT_STARTED, LOST)),
    Fault("start", "kill", 0, (NOT_STARTED, LOST)),
    Fault("warming", "kill", "nursery", (NOT_STARTED, LOST)),
    Fault("forked", "segv", "nursery", (NOT_STARTED, LOST)),
    Fault("idle", "kill", "nursery", (LOST,)),
    Fault("slot", "no space", "host", (OUR_FAULT,)),
)


class Orders:
    """The directory in which faults are ordered."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def give(self, fault: Fault) -> None:
        """Order a fault; it happens once."""
        assert not self.open(), f"never taken: {self.open()}"
        order = self.path / f"{fault.point}.{fault.rank}"
        written = order.with_suffix(".new")
        written.write_text(fault.kind)
        written.rename(order)

    def withdraw(self) -> None:
        """Take back what nobody has taken."""
        for path in self.path.iterdir():
            path.unlink(missing_ok=True)

    def open(self) -> list[str]:
        """Orders that nobody has taken yet."""
        told = ("taken-", "modules.", "variables.")
        return [p.name for p in self.path.iterdir() if not p.name.startswith(told)]


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def children(pid: int) -> set[int]:
    """Processes, zombies too, whose parent is this one."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parent = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:
                continue
            if int(parent) == pid:
                found.add(int(name))
    return found


def descendants(pid: int) -> set[int]:
    """Children, and theirs."""
    found = children(pid)
    return found.union(*(descendants(child) for child in found))


def num_fds(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_threads(pid: int) -> int:
    """How many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))
