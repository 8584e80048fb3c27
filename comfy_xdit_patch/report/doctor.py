"""Say what is installed, what would be planned, what fits, and what a running ComfyUI reports.

Runs in: a process of its own, started by the user. Changes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
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
from comfy_xdit_patch.report.doctor_server import Line, ask, judged
from comfy_xdit_patch.settings import given, read_settings, unknown_names
from comfy_xdit_patch.variables import VARIABLES

CHECK_DEADLINE_S = 180
START_FILE = "comfy_xdit_patch.pth"


@dataclass(slots=True)
class Report:
    """What the doctor found, by section."""

    server: dict[str, Any] | None = None
    """What the running ComfyUI answered."""
    sections: list[tuple[str, list[Line]]] = field(default_factory=list)

    def section(self, title: str) -> None:
        """Begin a section."""
        self.sections.append((title, []))

    def say(self, text: str, *, is_wrong: bool = False) -> None:
        """Add a line to the section that was begun last."""
        self.sections[-1][1].append(Line(text, is_wrong))

    @property
    def num_wrong(self) -> int:
        return sum(line.is_wrong for _, lines in self.sections for line in lines)

    @property
    def text(self) -> str:
        """For people."""
        lines = []
        for title, said in self.sections:
            lines += ["", title, *(f"  {'! ' if one.is_wrong else '  '}{one.text}" for one in said)]
        wrong = self.num_wrong
        verdict = f"{wrong} thing(s) to mend, marked !" if wrong else "Nothing is wrong."
        return "\n".join([*lines[1:], "", verdict])

    @property
    def json(self) -> str:
        """The same as data."""
        body = {
            "version": __version__,
            "is_well": not self.num_wrong,
            "sections": [
                {"title": title, "lines": [asdict(line) for line in lines]}
                for title, lines in self.sections
            ],
            "server": self.server,
        }
        return json.dumps(body, indent=1)


def examine(*, comfyui: str | None, url: str) -> Report:
    """Ask the running ComfyUI, and look at this machine by its settings, or else the shell's."""
    answer = ask(url)
    report = Report(answer.status)
    report.section(f"Running ComfyUI at {url}")
    lines = [answer.line] if answer.line else judged(answer.status or {})
    for line in lines:
        report.say(line.text, is_wrong=line.is_wrong)
    of_server = answer.status if answer.is_whole else None
    _installation(report)
    _settings(report, of_server)
    _devices(report, of_server)
    if comfyui is not None:
        report.section(f"Patch points in {comfyui}")
        misfit = _check_tree(Path(comfyui))
        report.say(misfit or "all points fit", is_wrong=misfit is not None)
    return report


def _installation(report: Report) -> None:
    python = sys.version.split()[0]
    report.section(f"Installation: comfy-xdit-patch {__version__}, Python {python}")
    started = [path for path in sys.path if (Path(path) / START_FILE).is_file()]
    report.say(
        f"{START_FILE} in {', '.join(started)}"
        if started
        else f"no {START_FILE} on sys.path: ComfyUI will not be patched. Run `python install.py`.",
        is_wrong=not started,
    )
    for package in ("torch", "xfuser", "diffusers", "safetensors", "wrapt", "prometheus-client"):
        version = _version(package)
        report.say(f"{package} {version or 'is missing'}", is_wrong=version is None)


def _settings(report: Report, of_server: dict[str, Any] | None) -> None:
    """Show those in force: the server's if one answers, which may differ from the shell's."""
    shell = given()
    if of_server is None:
        report.section("Settings of this shell")
        for variable in VARIABLES:
            is_set = os.environ.get(variable.name, "").strip()
            report.say(f"{variable.name} = {shell[variable.name]}{'' if is_set else ' (default)'}")
        for name, hint in unknown_names().items():
            text = f"{name} is not a setting of ours and has no effect. {hint}"
            report.say(text, is_wrong=True)
        return
    report.section("Settings of the running ComfyUI")
    for name, value in of_server["settings"].items():
        text = f"{name} = {value}"
        if name in of_server["settings_changed"]:
            text += ", changed since it started"
        if shell[name] != value:
            text += f" (this shell has {shell[name]})"
        report.say(text)


def _devices(report: Report, of_server: dict[str, Any] | None) -> None:
    report.section("Devices and plan")
    budget: int | None = None
    strategy = AUTO
    try:
        settings = read_settings(None if of_server is None else of_server["settings"])
        budget = settings.gpu_memory_bytes
        devices = devices_of(settings) if of_server is None else _devices_there(of_server)
        if not isinstance(devices, Refusal):
            strategy = settings.strategy
    except SettingsError as error:
        is_said = of_server is not None and of_server["reason"] == str(error)
        report.say(str(error), is_wrong=not is_said)
        devices = Refusal("the settings are wrong")
    if isinstance(devices, Refusal):
        report.say(f"not parallel: {devices.reason}")
    else:
        for rank, device in enumerate(devices):
            report.say(f"rank {rank}: {device.name} {device.uuid or ''}".rstrip())
        for batch in (1, 2):
            planned = _planned(batch, len(devices), strategy)
            report.say(f"1024 x 1024 px, batch {batch}: {planned}")
        if not devices[0].is_cpu:
            report.section("Links")
            found = survey(devices)
            for line in place_lines(found):
                report.say(line)
            for fault in gpu_faults(devices, found):
                report.say(fault, is_wrong=True)
    report.section("Memory")
    known = () if isinstance(devices, Refusal) else devices
    for line in memory_lines(known, budget, strategy):
        report.say(line)


def _devices_there(of_server: dict[str, Any]) -> tuple[Device, ...] | Refusal:
    """The devices of a running ComfyUI's ranks: it may see other GPUs than this process."""
    if not of_server["ranks"]:
        return Refusal(of_server["reason"])
    return tuple(
        Device(
            rank["name"],
            rank["uuid"],
            rank["memory"]["total_bytes"] if rank["uuid"] else None,
        )
        for rank in of_server["ranks"]
    )


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
