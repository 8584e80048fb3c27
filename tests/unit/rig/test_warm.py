"""A process that is forked from the warm one finds what a cold one finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rig.warm import THREADS, Forked, start

REPORT = """
import json, os, signal, sys
found = {
    "arguments": sys.argv,
    "original": sys.orig_argv[1:],
    "executable": sys.executable,
    "path": sys.path,
    "flags": list(sys.flags),
    "main": [__name__, os.path.basename(__file__)],
    "folder": os.getcwd(),
    "environment": dict(os.environ),
    "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1],
    "threads": os.listdir("/proc/self/task") == [str(os.getpid())],
    "leads its session": os.getsid(0) == os.getpid(),
    "Ctrl+C": str(signal.getsignal(signal.SIGINT)),
    "input": sys.stdin.read(),
    "hooked": any(type(f).__module__ == "comfy_xdit_patch.bootstrap" for f in sys.meta_path),
    "ours": sorted(n for n in sys.modules if n.startswith(("comfy", "nodes"))),
}
os.write(int(sys.argv[1]), json.dumps(found).encode())
"""
CTRL_C = """
import sys, time
print("here", flush=True)
try:
    time.sleep(60)
finally:
    print("tidied up")
"""


def run(script: Path, *arguments: str, is_cold: bool, **options: Any) -> Any:
    log = options.pop("log")
    with open(os.devnull) as nothing:
        return start(
            [str(script), *arguments],
            folder=script.parent,
            environment={**os.environ, **THREADS, **options.pop("environment", {})},
            stdin=nothing.fileno(),
            output=log.fileno(),
            is_cold=is_cold,
            **options,
        )


@pytest.mark.parametrize("strategy", ["", "off"])
def test_a_forked_process_finds_what_a_cold_one_finds(tmp_path: Path, strategy: str) -> None:
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    folder = tmp_path / "first"
    folder.mkdir()
    variables = {"PYTHONPATH": str(folder), "XDIT_STRATEGY": strategy}
    found = []
    for is_cold in (True, False):
        read, write = os.pipe()
        with (tmp_path / "log").open("w+") as log, os.fdopen(read) as replies:
            process = run(
                script,
                str(write),
                is_cold=is_cold,
                log=log,
                environment=variables,
                pass_fds=[write],
            )
            os.close(write)
            found.append(json.loads(replies.read() or "{}"))
            assert process.wait(60) == 0, (tmp_path / "log").read_text()
            assert isinstance(process, Forked) != is_cold
    cold, forked = found
    # Numbers of pipes differ from one start to the next.
    for each in found:
        del each["arguments"][1], each["original"][1]
        assert len(each.pop("descriptors")) == 4
    assert forked == cold
    assert forked["hooked"] == (strategy != "off")


def test_its_end_is_told_as_of_a_child(tmp_path: Path) -> None:
    script = tmp_path / "end.py"
    for text, code in (("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1), (CTRL_C, None)):
        script.write_text(text)
        with (tmp_path / "log").open("w+") as log:
            process = run(script, is_cold=False, log=log)
            if code is not None:
                assert process.wait(30) == code
                continue
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
            while "here" not in (tmp_path / "log").read_text():
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT
            assert "tidied up" in (tmp_path / "log").read_text()
            killed = run(script, is_cold=False, log=log)
            killed.kill()
            assert killed.wait(30) == -signal.SIGKILL
            killed.kill()  # nothing any more


@pytest.mark.parametrize("name", ["HOME", "TMPDIR", "OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_"])
def test_what_libraries_read_at_their_import_is_never_old(tmp_path: Path, name: str) -> None:
    script = tmp_path / "nothing.py"
    script.write_text("")
    with (tmp_path / "log").open("w+") as log:
        process = run(script, is_cold=False, log=log, environment={name: "7"})
        assert not isinstance(process, Forked)
        assert process.wait(60) == 0
