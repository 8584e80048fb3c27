"""Say what is installed, what would be planned, what fits, and what a running ComfyUI reports.

Runs in: a process of its own, started by the user. Changes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from comfy_xdit_patch import __version__
from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.hardware.chosen_devices import devices_of
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.hardware.survey import survey
from comfy_xdit_patch.planning.planner import plan_call
from comfy_xdit_patch.planning.strategy import AUTO, Strategy
from comfy_xdit_patch.report.doctor_sections import (
    EXAMPLE,
    gpu_faults,
    memory_lines,
    place_lines,
)
from comfy_xdit_patch.settings import VARIABLES, read_settings, unknown_names

CHECK_DEADLINE_S = 180
ASK_DEADLINE_S = 3.0
START_FILE = "comfy_xdit_patch.pth"


def examine(*, comfyui: str | None, url: str) -> tuple[str, bool]:
    """Return the report and whether nothing in it is wrong."""
    lines: list[str] = []
    wrong: list[str] = []

    def section(title: str) -> None:
        lines.append(f"\n{title}")

    def say(text: str, *, is_wrong: bool = False) -> None:
        lines.append(f"  {'! ' if is_wrong else '  '}{text}")
        if is_wrong:
            wrong.append(text)

    lines.append(f"comfy-xdit-patch {__version__}, Python {sys.version.split()[0]}")
    section("Installation")
    started = [path for path in sys.path if (Path(path) / START_FILE).is_file()]
    say(
        f"{START_FILE} in {', '.join(started)}"
        if started
        else f"no {START_FILE} on sys.path: ComfyUI will not be patched. Run `python install.py`.",
        is_wrong=not started,
    )
    for package in ("torch", "xfuser", "diffusers", "safetensors", "wrapt"):
        version = _version(package)
        say(f"{package} {version or 'is missing'}", is_wrong=version is None)

    section("Settings")
    for variable in VARIABLES:
        value = os.environ.get(variable.name)
        say(f"{variable.name} = {value or variable.default}{'' if value else ' (default)'}")
    for name, hint in unknown_names().items():
        say(f"{name} is not a setting of ours and has no effect. {hint}", is_wrong=True)
    section("Devices and plan")
    budget: int | None = None
    strategy = AUTO
    try:
        settings = read_settings()
        budget = settings.gpu_memory_bytes
        devices: tuple[Device, ...] | Refusal = devices_of(settings)
        if not isinstance(devices, Refusal):
            strategy = settings.strategy
    except SettingsError as error:
        say(str(error), is_wrong=True)
        devices = Refusal("the settings are wrong")
    if isinstance(devices, Refusal):
        say(f"not parallel: {devices.reason}")
    else:
        for rank, device in enumerate(devices):
            say(f"rank {rank}: {device.name} {device.uuid or ''}".rstrip())
        for batch in (1, 2):
            say(f"1024 x 1024 px, batch {batch}: {_planned(batch, len(devices), strategy)}")
        if not devices[0].is_cpu:
            section("Links")
            found = survey(devices)
            for line in place_lines(found):
                say(line)
            for fault in gpu_faults(devices, found):
                say(fault, is_wrong=True)
    section("Memory")
    known = () if isinstance(devices, Refusal) else devices
    for line in memory_lines(known, budget, strategy):
        say(line)

    if comfyui is not None:
        section(f"Patch points in {comfyui}")
        misfit = _check_tree(Path(comfyui))
        say(misfit or "all points fit", is_wrong=misfit is not None)

    section(f"Running ComfyUI at {url}")
    for line in _ask(url):
        say(line)
    verdict = "Nothing is wrong." if not wrong else f"{len(wrong)} thing(s) to mend, marked !"
    return "\n".join([*lines, "", verdict]), not wrong


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _planned(batch: int, world_size: int, strategy: Strategy) -> str:
    workload = replace(EXAMPLE, batch_size=batch)
    plan = plan_call(workload, world_size=world_size, strategy=strategy)
    return f"one GPU, {plan.reason}" if isinstance(plan, Refusal) else plan.name


def _check_tree(root: Path) -> str | None:
    """Import a ComfyUI with this package in a process of its own, and ask how the points fit."""
    if not (root / "comfy" / "model_patcher.py").is_file():
        return f"{root} is not a ComfyUI tree: comfy/model_patcher.py is missing"
    code = (
        "import sys; sys.argv = ['main.py', '--cpu']; sys.path.insert(0, '.')\n"
        "import comfy_xdit_patch.bootstrap, comfy.options\n"
        "comfy.options.enable_args_parsing()\n"
        "import comfy.sd, comfy.samplers\n"
        "from comfy_xdit_patch.host.guest.activation import ACTIVATION as a\n"
        "sys.exit(None if a.sampling is not None and a.sampling.active else (a.refused or 'off'))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XDIT_")}
    try:
        checked = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**environment, "XDIT_GPUS": "cpu:2"},
            capture_output=True,
            text=True,
            timeout=CHECK_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its modules were not imported within {CHECK_DEADLINE_S} s"
    if checked.returncode == 0:
        return None
    return "\n".join(checked.stderr.strip().splitlines()[-3:])


def _ask(url: str) -> list[str]:
    """Ask a running ComfyUI for its status object."""
    try:
        with urllib.request.urlopen(f"{url}/xdit/status", timeout=ASK_DEADLINE_S) as answer:
            status: Any = json.load(answer)
    except urllib.error.HTTPError as error:
        return [f"answers {error.code}: it runs without comfy-xdit-patch"]
    except (OSError, ValueError) as error:
        return [f"does not answer ({error})"]
    if not isinstance(status, dict) or not {"version", "state", "reason"} <= set(status):
        return ["answers, but not as comfy-xdit-patch does: something else listens there"]
    lines = [f"state: {status['state']}" + (f", {status['reason']}" if status["reason"] else "")]
    for rank in status.get("ranks", ()):
        lines.append(
            f"rank {rank['rank']}: pid {rank['pid']}, {rank['device']}, {rank['state']}, "
            f"{rank['forwards']} forwards"
        )
    if "steps_parallel" in status:
        lines.append(
            f"{status['steps_parallel']} steps parallel, {status['steps_fell_back']} fell back"
        )
        lines += [f"fell back {n} times: {why}" for why, n in status["fall_back_reasons"].items()]
    if status.get("peer_to_peer_disabled"):
        first = str(status["peer_to_peer_disabled"]).splitlines()[0]
        lines.append(f"peer-to-peer is switched off, because with it: {first}")
    return lines
