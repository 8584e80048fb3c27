"""Where logs lie, and when they go."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from pathlib import Path

import pytest

from comfy_xdit_patch.workers.log_files import LOG_PREFIX, make_log_dir

NO_PROCESS = "4194305"  # above the largest process number that Linux gives


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return the directory that ``tempfile`` takes for the system's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_logs_lie_in_a_private_directory_of_their_own(temporary):
    first, second = make_log_dir(), make_log_dir()
    assert first != second
    for log_dir in (first, second):
        assert log_dir.parent == temporary
        assert log_dir.name.startswith(f"{LOG_PREFIX}{os.getpid()}-")
        assert mode(log_dir) == 0o700


def test_a_link_in_place_of_a_directory_is_not_followed(temporary, tmp_path):
    victim = tmp_path / "private"
    victim.mkdir()
    (victim / "letter").touch()
    (temporary / f"{LOG_PREFIX}{NO_PROCESS}-x").symlink_to(victim)
    make_log_dir()
    assert (victim / "letter").exists()


def test_logs_of_hosts_that_ended_are_cleared_and_those_of_others_are_kept(temporary):
    for name in (NO_PROCESS, "1", "notes"):
        (temporary / f"{LOG_PREFIX}{name}-x").mkdir()
        (temporary / f"{LOG_PREFIX}{name}-x" / "worker-0.log").touch()
    log_dir = make_log_dir()
    left = {path.name for path in temporary.iterdir()}
    assert left == {f"{LOG_PREFIX}1-x", f"{LOG_PREFIX}notes-x", log_dir.name}


def test_a_program_that_replaced_a_host_in_its_process_clears_away_after_it(temporary):
    """As after ComfyUI-Manager's restart by ``execv``."""
    before = temporary / f"{LOG_PREFIX}{os.getpid()}-before"
    before.mkdir()
    child = os.fork()
    if child == 0:
        os._exit(0)
    (before / "worker-0.log").touch()
    for name in (str(child), NO_PROCESS, "1", "no number"):
        (before / f"{name}.pid").touch()
    deadline = time.monotonic() + 10
    while " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
    log_dir = make_log_dir()
    assert list(temporary.iterdir()) == [log_dir]
    assert not os.path.exists(f"/proc/{child}"), "nobody had waited for it"


def test_leavings_that_cannot_be_cleared_are_no_obstacle(temporary):
    (temporary / f"{LOG_PREFIX}{NO_PROCESS}-x").touch()
    (temporary / f"{LOG_PREFIX}{NO_PROCESS}-y" / "folder").mkdir(parents=True)
    assert make_log_dir().is_dir()
