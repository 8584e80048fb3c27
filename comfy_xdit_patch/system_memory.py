"""How much CPU memory this process may still take.

Runs in: host, and the doctor's process. Standard library only.

The kernel knows what the machine has free; a container has a limit of its own, which the kernel
keeps by ending processes. Limits of a control group hold for all groups within it. Files that the
group has read are counted to it and given back when memory is short, so they count as free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def available_bytes(root: Path = ROOT, proc: Path = PROC) -> int:
    """Bytes that are free, in the machine and in every control group of this process."""
    lines = (proc / "meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return max(0, min([machine, *_left_in_groups(root, proc)]))


def _left_in_groups(root: Path, proc: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = "memory.max", "memory.current", "inactive_file"
            yield from _left(root, path, names)
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _left(root / "memory", path, names)


def _left(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """What is left in a group and in those around it; in a container, this path may be hidden."""
    limit_name, used_name, file_name = names
    group = root / path.strip("/")
    while root in (group, *group.parents):
        try:
            limit = (group / limit_name).read_text().strip()
            used = int((group / used_name).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            limit = "max"
        if limit != "max":
            yield int(limit) - used + int(stat.get(file_name, 0))
        group = group.parent
