"""Options of the check: what is legal, and what is said of what is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_xdit_patch.__main__ import main
from comfy_xdit_patch.check import command
from comfy_xdit_patch.check.cases import (
    NO_DYNAMIC_VRAM,
    OURS,
    SOONER,
    SPLIT,
    STATIC,
    STOCK,
    cases_for,
)


@pytest.fixture
def comfyui(tmp_path):
    """A directory that looks like a ComfyUI."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    (tmp_path / "comfy" / "model_patcher.py").touch()
    (tmp_path / "comfy" / "cli_args.py").write_text('parser.add_argument("--port")')
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.99.0"')
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "1000"], '--size "1000" is not legal. Legal: a multiple of 16 from 64 to 4096'),
        (["--size", "32"], "from 64 to 4096"),
        (["--steps", "1"], '--steps "1" is not legal. Legal: a multiple of 1 from 2 to 100'),
        (["--width", "200"], '--width "200" is not legal. Legal: a multiple of 128'),
        (["--json", "/there/is/no/such/folder.json"], "Legal: a file in a directory that there is"),
    ],
)
def test_an_option_that_is_not_legal_ends_with_2_and_says_what_is(comfyui, capsys, options, said):
    assert main(["check", "--comfyui", str(comfyui), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_directory_without_comfyui_ends_with_2(tmp_path, capsys):
    assert main(["check", "--comfyui", str(tmp_path)]) == 2
    assert f'--comfyui "{tmp_path}" is not legal. Legal: the directory' in capsys.readouterr().err


def test_install_py_calls_it(tmp_path):
    install = Path(__file__).parents[3] / "install.py"
    line = [sys.executable, str(install), "check-gpus", "--comfyui", str(tmp_path)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f'--comfyui "{tmp_path}" is not legal' in done.stderr


@pytest.mark.parametrize("options", [[], ["--comfyui", ".", "--depth", "most"]])
def test_what_the_parser_refuses_ends_with_2(options, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", *options])
    assert ended.value.code == 2
    assert "--" in capsys.readouterr().err


def test_no_gpu_ends_with_1(comfyui, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["check", "--comfyui", str(comfyui), "--json", str(tmp_path / "out.json")]) == 1
    assert "No usable GPU is visible to this Python" in capsys.readouterr().err


def test_a_signal_ends_it_as_ctrl_c_does(comfyui, capsys, monkeypatch):
    def check(_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(command, "_check", check)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["check", "--comfyui", str(comfyui)]) == 1
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_case_that_this_comfyui_has_no_option_for_is_left_out(comfyui):
    names = [case.name for case in cases_for(comfyui, 2)]
    assert names == [STOCK, SPLIT, OURS]
    (comfyui / "comfy" / "cli_args.py").write_text(f'parser.add_argument("{NO_DYNAMIC_VRAM}")')
    cases = cases_for(comfyui, 2)
    assert [case.name for case in cases] == [STOCK, SPLIT, OURS, STATIC]
    assert cases[2].variables == {"XDIT_STRICT": "1", "XDIT_GPUS": "all", **SOONER}
    assert cases_for(comfyui, 1)[2].variables["XDIT_GPUS"] == "1"
