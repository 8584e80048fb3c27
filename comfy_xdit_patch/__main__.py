"""``comfy-xdit doctor``, ``check``, ``plan``, ``verdicts``; also ``python -m comfy_xdit_patch``.

Runs in: a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from comfy_xdit_patch import __version__
from comfy_xdit_patch.check import command as check
from comfy_xdit_patch.errors import SettingsError
from comfy_xdit_patch.host.pace import verdict_store
from comfy_xdit_patch.report import plan_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(prog="comfy-xdit", description="comfy-xdit-patch tools")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is patched, planned and refused, and why")
    doctor.add_argument("--comfyui", metavar="PATH", help="check the patch points of this ComfyUI")
    doctor.add_argument(
        "--url",
        default="http://127.0.0.1:8188",
        help="a running ComfyUI to ask (default: %(default)s)",
    )
    doctor.add_argument("--json", action="store_true", help="the same as data")
    check.add_arguments(
        commands.add_parser("check", help="make an image on this machine's GPUs, and compare it")
    )
    plan = commands.add_parser("plan", help="predict every plan, also for GPUs you do not have")
    plan_report.add_arguments(plan)
    verdicts = commands.add_parser("verdicts", help="what XDIT_STRATEGY=auto has measured")
    verdicts.add_argument("--clear", action="store_true", help="forget it, to measure again")
    options = parser.parse_args(argv)
    if options.command == "check":
        return check.run(options)
    if options.command == "verdicts":
        sys.stdout.write(verdict_store.report(clear=options.clear) + "\n")
        return 0
    if options.command == "plan":
        return _plan(options)
    from comfy_xdit_patch.report.doctor import examine

    report = examine(comfyui=options.comfyui, url=options.url)
    sys.stdout.write((report.json if options.json else report.text) + "\n")
    return 1 if report.num_wrong else 0


def _plan(options: argparse.Namespace) -> int:
    try:
        table = plan_report.plan_table(options)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(table.text + "\n")
    return 0 if table.is_possible else 1


if __name__ == "__main__":
    raise SystemExit(main())
