"""What the .pth costs a Python process that has nothing to do with ComfyUI."""

from __future__ import annotations

import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable

LIMIT_US = 2000
STARTS = 25
BOOTSTRAP = "comfy_xdit_patch.bootstrap"
# Time of the processor: other tests run beside this one.
CODE = f"""
import site, sys, time  # as at every start
sys.path.append({sysconfig.get_path("purelib")!r})
start = time.process_time_ns()
import {BOOTSTRAP}
print((time.process_time_ns() - start) // 1000)
"""


def test_every_python_process_starts_it() -> None:
    code = f"import sys; print({BOOTSTRAP!r} in sys.modules)"
    assert output("-c", code) == "True", "the package is not installed with its .pth in this Python"


def test_interpreter_start_costs_less_than_two_milliseconds_more(
    record_property: Callable[[str, object], None],
) -> None:
    costs = [int(output("-S", "-c", CODE)) for _ in range(STARTS)]
    record_property("microseconds, median", statistics.median(costs))
    assert statistics.median(costs) < LIMIT_US


def output(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
