"""Whether a file is still the one that it was.

Runs in: host and worker. No torch.
"""

from __future__ import annotations

import os


def file_identity(path: str) -> str:
    """Name what a path stands for: device, inode, size, and when contents and inode changed.

    A program that writes to a file may put its time of change back, but not that of the inode.
    Empty for a file that cannot be found: no file is that.
    """
    try:
        stat = os.stat(path)
    except OSError:
        return ""
    fields = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return ":".join(map(str, fields))


def is_mapped_here(path: str) -> bool:
    """Whether this process has pages of the file in its memory: they change with the file."""
    try:
        inode = os.stat(path).st_ino
        with open("/proc/self/maps") as maps:
            lines = [line.split(maxsplit=5) for line in maps]
    except OSError:
        return True  # Nobody can tell.
    return any(len(line) == 6 and line[4] == str(inode) for line in lines)
