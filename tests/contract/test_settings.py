"""The set of settings is frozen here: a new one fails until somebody decides that it is needed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from comfy_xdit_patch.settings import Settings
from comfy_xdit_patch.variables import OF_XFUSER, VARIABLES

PACKAGE = Path(__file__).resolve().parents[2] / "comfy_xdit_patch"
NAMES = {
    "XDIT_GPUS",
    "XDIT_STRATEGY",
    "XDIT_BALANCE",
    "XDIT_TRANSFER_DTYPE",
    "XDIT_GPU_MEMORY",
    "XDIT_VAE",
    "XDIT_CUDA_GRAPHS",
    "XDIT_STRICT",
    "XDIT_START",
    "XDIT_START_TIMEOUT",
    "XDIT_STEP_TIMEOUT",
    "XDIT_IDLE_TIMEOUT",
    "XDIT_CPU_THREADS",
    "XDIT_LOG_DIR",
    "XDIT_STATUS",
    "XDIT_REMOTE_SETTINGS",
}


def test_there_are_these_settings_and_no_others():
    assert [v.name for v in VARIABLES] == list(dict.fromkeys(v.name for v in VARIABLES))
    assert {v.name for v in VARIABLES} == NAMES
    assert len(Settings.__slots__) == len(NAMES)


def test_no_other_setting_is_named_anywhere_in_the_package():
    named = {
        name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in re.findall(r"(?<![A-Z_])XDIT_[A-Z][A-Z_]*[A-Z]", node.value)
    }
    assert named == NAMES | set(OF_XFUSER)


def test_every_setting_says_its_default_its_legal_values_and_its_meaning():
    for variable in VARIABLES:
        assert variable.default
        assert variable.legal
        assert variable.meaning.endswith(".")
