"""What the .pth costs a Python process that has nothing to do with ComfyUI."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections.abc import Callable

LIMIT_US = 2000
STARTS = 25


def test_interpreter_start_costs_less_than_two_milliseconds_more(
    record_property: Callable[[str, object], None],
) -> None:
    costs = []
    for _ in range(STARTS):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "pass"],
            capture_output=True,
            text=True,
            check=True,
        )
        # Cumulative microseconds of ``import comfy_xdit_patch.bootstrap``, its package included.
        found = re.findall(r"\|\s+(\d+) \|\s+comfy_xdit_patch\.bootstrap$", done.stderr, re.M)
        assert len(found) == 1, "the package is not installed with its .pth in this Python"
        costs.append(int(found[0]))
    record_property("microseconds, median", statistics.median(costs))
    assert statistics.median(costs) < LIMIT_US
