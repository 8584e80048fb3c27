"""The rig's environment works where it was built, and one that was interrupted is built again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rig import environment

NOTHING = "# an environment with pip only\n"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file, and a cache, of this test."""
    path = tmp_path / "requirements.lock"
    path.write_text(NOTHING)
    monkeypatch.setattr(environment, "LOCK_FILE", path)
    monkeypatch.setenv(environment.RIG_CACHE, str(tmp_path / "cache"))
    return path


def test_its_scripts_start_and_an_interrupted_build_is_not_reused(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.write_text("no-such-package @ file:///nowhere\n")
    with pytest.raises(environment.RigError, match=r"installing requirements\.lock: exit code"):
        environment.ensure_environment()
    broken = environment.environment_path()
    assert broken.exists(), "the build was interrupted after it had begun"
    monkeypatch.setattr(environment, "environment_path", lambda: broken)
    lock.write_text(NOTHING)
    (broken / "left-over").touch()

    python = environment.ensure_environment()
    assert not (broken / "left-over").exists()
    script = python.with_name("pip")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert str(broken) in done.stdout

    (broken / "kept").touch()
    environment.ensure_environment()
    assert (broken / "kept").exists(), "a complete one is reused"


def test_what_goes_on_for_long_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "TELL_S", 0.05)
    with environment.telling("waiting"):
        time.sleep(0.3)
    assert capsys.readouterr().out.startswith("waiting: 0 s\n")
    command = [sys.executable, "-c", "import time; time.sleep(0.3)"]
    environment.run_logged(command, tmp_path / "log", "sleeping")
    assert "sleeping: 0 s\n" in capsys.readouterr().out


def test_a_command_that_takes_longer_than_it_may_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(environment.RigError, match=r"sleeping: not finished after 0\.2 s"):
        environment.run_logged(command, tmp_path / "log", "sleeping", 0.2)
