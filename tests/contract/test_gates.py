"""The gates that need no ComfyUI: formatter, linter, type checker, and names that must not leak."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from rig.repository import REPO, repository_files

DEADLINE_S = 300

GATES = {
    "ruff check": ["ruff", "check", "--no-cache", "."],
    "ruff format": ["ruff", "format", "--no-cache", "--check", "."],
    "mypy": ["mypy", "--strict", "comfy_xdit_patch", "install.py"],
}

# Absolute paths of the machine that this was written on, and of pages that are not in this
# repository. Written as patterns, so that they do not find themselves.
LEAKS = re.compile(r"/(?:work|root|home|Users)/[A-Za-z.]|\bshared/(?:design|style|reference)\b")


@pytest.mark.parametrize("gate", GATES)
def test_gate(gate):
    done = subprocess.run(
        [sys.executable, "-m", *GATES[gate]],
        cwd=REPO,
        env={**os.environ, "MYPYPATH": "tests"},  # install.py imports the rig from there
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_names_the_place_where_it_was_written():
    found = []
    for path in repository_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(REPO)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if LEAKS.search(line)
        ]
    assert found == []


def test_ci_runs_the_test_command_and_nothing_else():
    run = REPO / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    commands = [
        line
        for line in run.read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["exec python3 install.py test"]
