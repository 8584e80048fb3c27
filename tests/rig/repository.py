"""The files of the checkout that the tests run from.

Runs in: the rig's environment (standard library only).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def repository_files() -> list[Path]:
    """Every file of the checkout that git does not ignore; of an unpacked archive, every file."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if listed.returncode == 0:
        return [REPO / name for name in listed.stdout.split("\0") if (REPO / name).is_file()]
    return [path for path in REPO.rglob("*") if path.is_file()]
