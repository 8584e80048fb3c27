"""What is wrapped while switched off; the end of the host's process, and of one forked from it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

from comfy_xdit_patch.host.guest.activation import Activation
from comfy_xdit_patch.host.guest.patchset import PatchSet

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


def test_switched_off_no_point_is_active_that_changes_what_comfyui_computes():
    activation = Activation()
    host = SimpleNamespace(pool=SimpleNamespace(device_word="CPU ranks"))
    host.successor = lambda *_: host
    activation.host, activation._wrappers = host, SimpleNamespace(serve=lambda _: None)
    sets = activation.sampling, activation.controls, activation.decode = (
        PatchSet(()),
        PatchSet(()),
        PatchSet(()),
    )
    for is_off in (False, True, False):
        activation.change((), SimpleNamespace(is_off=is_off, strategy="auto"))
        assert [each.active for each in sets] == [not is_off] * 3
