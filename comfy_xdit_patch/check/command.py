"""``comfy-xdit check``: run the same image in stock ComfyUI and in parallel, and say what came out.

Runs in: the check's process, started by the user. Servers, and a child that asks torch for GPUs,
run one after the other, so that none is timed or measured beside another.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from comfy_xdit_patch import __version__
from comfy_xdit_patch.check import report
from comfy_xdit_patch.check.cases import STOCK, Bench, CaseResult, cases_for
from comfy_xdit_patch.check.comparison import compare, read_latent
from comfy_xdit_patch.check.graph import MODEL_NAME
from comfy_xdit_patch.check.machine import find_machine
from comfy_xdit_patch.check.model_file import Sizes, file_bytes, write_model
from comfy_xdit_patch.errors import CheckError, SettingsError
from comfy_xdit_patch.hardware.survey import driver_version
from comfy_xdit_patch.host.pace.case import comfyui_version
from comfy_xdit_patch.planning.family import HEAD_WIDTH
from comfy_xdit_patch.planning.residency import gib

DEPTHS = {"few": (2, 4), "true": (19, 38)}
"""Double and single blocks."""
WIDTH = 3072
MAX_SIDE_PX = 4096
MAX_STEPS = 100
SPARE_BYTES = 1 << 28
"""Disk space beside the model file, for latents, logs and ComfyUI's own folders."""
OUT = "comfy-xdit-check.json"


@dataclass(frozen=True, slots=True)
class Asked:
    """Options that are legal."""

    tree: Path
    out: Path
    sizes: Sizes
    size_px: int
    num_steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--comfyui", metavar="PATH", required=True, help="the ComfyUI to check with"
    )
    parser.add_argument(
        "--json", metavar="FILE", default=OUT, help="what to send us (default: %(default)s)"
    )
    parser.add_argument(
        "--depth",
        choices=sorted(DEPTHS),
        default="few",
        help="blocks of the model: few (2 + 4, 3 GB), or true (19 + 38, 24 GB, as FLUX.1 has)",
    )
    parser.add_argument("--size", type=int, default=1024, help="px a side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of an image (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=WIDTH, help="for tests: features of a token, not FLUX.1's own"
    )


def asked_of(options: argparse.Namespace) -> Asked:
    """Check the options.

    Raises:
        SettingsError: one has a value that is not legal.
    """
    tree = Path(options.comfyui).expanduser().resolve()
    if not ((tree / "main.py").is_file() and (tree / "comfy" / "model_patcher.py").is_file()):
        raise SettingsError(
            f'--comfyui "{options.comfyui}" is not legal. Legal: the directory of a ComfyUI, with '
            "main.py and comfy/model_patcher.py in it."
        )
    out = Path(options.json).expanduser().resolve()
    if not out.parent.is_dir() or out.is_dir():
        raise SettingsError(
            f'--json "{options.json}" is not legal. Legal: a file in a directory that there is.'
        )
    for name, least, most, multiple in (
        ("size", 64, MAX_SIDE_PX, 16),
        ("steps", 2, MAX_STEPS, 1),
        ("width", HEAD_WIDTH, WIDTH, HEAD_WIDTH),
    ):
        value = getattr(options, name)
        if not least <= value <= most or value % multiple:
            raise SettingsError(
                f'--{name} "{value}" is not legal. '
                f"Legal: a multiple of {multiple} from {least} to {most}."
            )
    num_double, num_single = DEPTHS[options.depth]
    sizes = Sizes(options.width, num_double, num_single)
    return Asked(tree, out, sizes, options.size, options.steps)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    try:
        asked = asked_of(options)
        with _ended_by_signals():
            is_working = _check(asked)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except CheckError as error:
        sys.stderr.write(f"check: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("check: interrupted. Everything that it started is ended.\n")
        return 1
    return 0 if is_working else 1


def _check(asked: Asked) -> bool:
    machine = find_machine()
    setup = report.Setup(
        package=__version__,
        comfyui=comfyui_version(asked.tree),
        driver=driver_version(),
        machine=machine,
        sizes=asked.sizes,
        size_px=asked.size_px,
        num_steps=asked.num_steps,
    )
    with tempfile.TemporaryDirectory(prefix="comfy-xdit-check-", ignore_cleanup_errors=True) as at:
        folder = Path(at)
        needed = file_bytes(asked.sizes)
        free = shutil.disk_usage(folder).free
        if free < needed + SPARE_BYTES:
            raise CheckError(
                f"The model file takes {gib(needed)} GiB, and {folder.parent} has {gib(free)} GiB "
                "free. Set TMPDIR to a directory with more."
            )
        _say("model file")
        write_model(folder / MODEL_NAME, asked.sizes)
        bench = Bench(
            tree=asked.tree,
            folder=folder,
            size_px=asked.size_px,
            num_steps=asked.num_steps,
            uuids=tuple(gpu.uuid for gpu in machine.gpus),
        )
        results: list[CaseResult] = []
        for case in cases_for(asked.tree, len(machine.gpus)):
            result = bench.run(case, say=_saying(case.name))
            results.append(_compared(result, report.find(results, STOCK)))
    text, is_working = report.verdict(results, num_ranks=len(machine.gpus))
    body = report.as_json(setup, results, text=text, is_working=is_working)
    asked.out.write_text(json.dumps(body, indent=2) + "\n")
    sys.stdout.write(f"{report.table(setup, results)}\n\n{text}\nWritten: {asked.out}\n")
    return is_working


def _compared(result: CaseResult, stock: CaseResult | None) -> CaseResult:
    """Add how far a latent is from stock's, or why it says nothing."""
    if result.latent is None:
        return result
    try:
        latent = read_latent(result.latent)
    except CheckError as error:
        return replace(result, error=str(error))
    if stock is None or stock.latent is None or stock.error is not None:
        return result
    return replace(result, difference=compare(read_latent(stock.latent), latent))


def _saying(name: str) -> Callable[[str], None]:
    return lambda text: _say(f"{name}: {text}")


def _say(text: str) -> None:
    sys.stderr.write(f"check: {text}\n")
    sys.stderr.flush()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the check as Ctrl+C does, so that its servers end too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
