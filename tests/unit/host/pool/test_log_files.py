"""Where logs lie, and when they go."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.host.pool.log_files import LOCK, LOG_PREFIX, LogDirectory, begin, make_log_dir

NO_PROCESS = "4194305"  # above the largest process number that Linux gives
HOST = """
import sys
from pathlib import Path
from comfy_xdit_patch.host.pool.log_files import make_log_dir
print(make_log_dir(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def ended(base, name, age_s=0):
    """A directory that a host left."""
    log_dir = base / f"{LOG_PREFIX}{name}"
    log_dir.mkdir()
    for file in (LOCK, "worker-0.log"):
        (log_dir / file).touch()
    then = time.time() - age_s
    os.utime(log_dir, (then, then))
    return log_dir


class Host:
    """Another process that has a directory there."""

    def __init__(self, base):
        command = [sys.executable, "-c", HOST, str(base)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.log_dir = Path(self.process.stdout.readline().strip())

    def end(self):
        self.process.kill()
        self.process.communicate()


def test_logs_lie_in_a_private_directory_of_their_own(tmp_path):
    first, second = make_log_dir(tmp_path), make_log_dir(tmp_path)
    assert first != second
    for log_dir in (first, second):
        assert log_dir.parent == tmp_path
        assert log_dir.name.startswith(f"{LOG_PREFIX}{os.getpid()}-")
        assert mode(log_dir) == 0o700


def test_the_logs_of_one_process_before_are_kept(tmp_path):
    log_path = tmp_path / "worker-0.log"
    for text in (b"first", b"second", b"third"):
        with begin(log_path) as log:
            log.write(text)
    assert log_path.read_text() == "third"
    assert (tmp_path / "worker-0.log.1").read_text() == "second"
    assert mode(log_path) == 0o600


def test_a_link_in_place_of_a_directory_is_not_followed(tmp_path):
    victim = tmp_path / "private"
    victim.mkdir()
    (victim / "letter").touch()
    base = tmp_path / "base"
    base.mkdir()
    for name in ("x", "y"):
        (base / f"{LOG_PREFIX}{NO_PROCESS}-{name}").symlink_to(victim)
    make_log_dir(base)
    assert (victim / "letter").exists()


def test_logs_of_hosts_that_ended_are_cleared_but_for_the_last(tmp_path):
    for name, age_s in ((f"{NO_PROCESS}-x", 30), ("1-x", 20), ("notes", 10)):
        ended(tmp_path, name, age_s)
    log_dir = make_log_dir(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{LOG_PREFIX}1-x", f"{LOG_PREFIX}notes", log_dir.name}


def test_a_host_that_lives_keeps_its_logs_whatever_its_number_says(tmp_path):
    """As of another container, whose processes are not to be seen from here."""
    host = Host(tmp_path)
    theirs = host.log_dir.rename(tmp_path / f"{LOG_PREFIX}{NO_PROCESS}-x")
    newer = ended(tmp_path, "1-x", age_s=-60)
    try:
        make_log_dir(tmp_path)
        assert theirs.is_dir()
        assert newer.is_dir()
    finally:
        host.end()
    make_log_dir(tmp_path)
    assert not theirs.exists()


def test_a_program_that_replaced_a_host_in_its_process_waits_for_its_nursery(tmp_path):
    """As after ComfyUI-Manager's restart by ``execv``."""
    before = ended(tmp_path, f"{os.getpid()}-before")
    child = os.fork()
    if child == 0:
        os._exit(0)
    for name in (str(child), NO_PROCESS, "1", "no number"):
        (before / f"{name}.pid").touch()
    deadline = time.monotonic() + 10
    while " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
    make_log_dir(tmp_path)
    assert not os.path.exists(f"/proc/{child}"), "nobody had waited for it"


def test_leavings_that_cannot_be_cleared_are_no_obstacle(tmp_path):
    (tmp_path / f"{LOG_PREFIX}{NO_PROCESS}-x").touch()
    (tmp_path / f"{LOG_PREFIX}{NO_PROCESS}-y" / "folder").mkdir(parents=True)
    assert make_log_dir(tmp_path).is_dir()


def test_a_directory_that_somebody_cleaned_away_is_made_again(tmp_path):
    logs = LogDirectory(tmp_path / "not" / "there")
    first = logs.get()
    assert logs.get() == first
    shutil.rmtree(first)
    assert logs.get().is_dir()
    shutil.rmtree(tmp_path / "not")
    assert logs.get().is_dir()


def test_without_a_setting_it_is_where_temporary_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert LogDirectory(None).get().parent == tmp_path


def test_a_place_that_is_none_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkerError, match=r"no place for the logs.*Not a directory.*XDIT_LOG_DIR"):
        LogDirectory(tmp_path / "file" / "logs").get()


def test_a_system_without_any_folder_for_temporary_files_is_told_apart_from_a_fault(monkeypatch):
    """As in a container whose root is read-only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/not-there"])
    with pytest.raises(WorkerError, match=r"no place for the logs.*No usable temporary directory"):
        LogDirectory(None).get()
