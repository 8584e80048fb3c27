"""The end of the host's process, and of one that was forked from it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, os
from comfy_xdit_patch.host.guest.activation import stop_unless_forked
HOST = os.getpid()
class Pool:
    def stop(self):
        print("stopped by the host" if os.getpid() == HOST else "by a child", flush=True)
atexit.register(stop_unless_forked, Pool(), os.getpid())
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_that_ends_in_the_usual_way_does_not_end_the_workers():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "stopped by the host\n"
