"""``comfy-xdit check`` on two emulated cards: table, JSON and exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rig.server import Server
from rig.trees import Tree

from comfy_xdit_patch.check.cases import OURS, SPLIT, STATIC, STOCK

pytestmark = [
    pytest.mark.thorough,  # its parts are in tests/unit/check, its cards in test_emulated_cards.py
    pytest.mark.slow,  # four starts of ComfyUI, two of them with ranks
    pytest.mark.newest_only,
    pytest.mark.needs("comfy/memory_management.py", "aimdo_enabled"),
]

GIB = 1 << 30
NUM_STEPS = 2
DEADLINE_S = 900


def test_it_makes_the_same_latent_on_two_cards_and_says_so(tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "comfy_xdit_patch", "check", "--comfyui", str(tree.path)]
    command += ["--json", str(out), "--width", "256", "--size", "128", "--steps", str(NUM_STEPS)]
    cards = {"EMULATED_CARDS": "4090:4,4090:4", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=Server(tree, tmp_path, device="emulated", env=cards).environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{STOCK}: warm-up image" in done.stderr

    said = done.stdout
    for part in (
        f"ComfyUI {tree.version}",
        "rank 1: NVIDIA GeForce RTX 4090 (emulated), 4.0 GiB",
        "no peer-to-peer: ranks 0-1",
        f"Planned, {OURS}: ulysses=2",
        "all weights on every card",
        "It works here: 2 of 2 steps in parallel on 2 GPUs",
    ):
        assert part in said, said
    assert max(map(len, said.splitlines()[:-2])) <= 100

    told = json.loads(out.read_text())
    assert told["schema"] == 1
    assert told["is_working"]
    cases = {case["name"]: case for case in told["cases"]}
    assert list(cases) == [STOCK, SPLIT, OURS, STATIC]
    for case in cases.values():
        assert case["error"] is None
        assert case["seconds_per_step"] > 0
    assert cases[SPLIT]["difference"]["max_error"] > 0, "another attention function was used"
    for name in (OURS, STATIC):
        assert cases[name]["run"]["steps_parallel"] == NUM_STEPS
        assert cases[name]["forwards"] == [NUM_STEPS, NUM_STEPS]
        assert cases[name]["difference"]["max_error"] <= told["bound"]
        for card in cases[name]["memory"]:
            assert card["before_bytes"] < card["after_free_bytes"] <= card["most_bytes"] < 4 * GIB
    for name, is_dynamic in ((OURS, True), (STATIC, False)):
        assert (
            any("DynamicVRAM support detected" in line for line in cases[name]["log"]) == is_dynamic
        )
    assert not list(tmp_path.glob("comfy-xdit-check-*")), "the temporary directory is left"
