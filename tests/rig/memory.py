"""Measure the memory of a process and its children, as the kernel accounts for it.

Runs in: the rig's environment (standard library only; Linux).

PSS divides every shared page by the number of processes that map it, so PSS may be added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
SHARED_MEMORY = ("/memfd:", "/dev/shm/")
MAILBOXES = "/memfd:comfy-xdit-mailboxes"
"""Of a size that does not change; pages are there from their first use on."""


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """Bytes of the pages of mapped files in one or more processes.

    ``shared`` counts a page once for each process that maps it; ``pss`` counts it once in all.
    """

    pss: int = 0
    private_clean: int = 0
    private_dirty: int = 0
    shared: int = 0

    def __add__(self, other: Mapped) -> Mapped:
        return Mapped(
            pss=self.pss + other.pss,
            private_clean=self.private_clean + other.private_clean,
            private_dirty=self.private_dirty + other.private_dirty,
            shared=self.shared + other.shared,
        )


def own_memory(pid: int) -> int:
    """Return the bytes of a process that do not depend on what else runs.

    Its anonymous pages, also those that a fork left it to share until one of the two writes, and
    all pages of shared memory that it maps, but for mailboxes: which of them have been used says
    nothing of what grows. A process that has ended is an error.

    PSS will not do to find a leak: its part of a library grows when another program ends.
    """
    total = 0
    for name, amounts in _mappings(pid):
        total += amounts["Anonymous"]
        if name.startswith(SHARED_MEMORY) and not name.startswith(MAILBOXES):
            total += amounts["Rss"]
    return total


def mapped_file(pids: Iterable[int], path: Path) -> Mapped:
    """Return what these processes together hold of one mapped file."""
    wanted, total = str(path.resolve()), Mapped()
    for pid in pids:
        for name, amounts in _mappings(pid):
            if name == wanted:
                total += Mapped(
                    pss=amounts["Pss"],
                    private_clean=amounts["Private_Clean"],
                    private_dirty=amounts["Private_Dirty"],
                    shared=amounts["Shared_Clean"] + amounts["Shared_Dirty"],
                )
    return total


def _mappings(pid: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield each mapping's file ("" if none) and its amounts in bytes."""
    name, lines = "", list[str]()
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if first.endswith(":"):
            lines.append(line)
            continue
        # A mapping's head: address, access, offset, device, inode, and maybe a name.
        if lines:
            yield name, dict(_amounts(lines))
        head, lines = line.split(maxsplit=5), []
        name = head[5] if len(head) > 5 else ""
    if lines:
        yield name, dict(_amounts(lines))


def _amounts(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            yield words[0].rstrip(":"), int(words[1]) * KIB
