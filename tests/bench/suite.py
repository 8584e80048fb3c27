"""``python install.py bench``: what the product costs and brings, in rows with their baselines.

Runs in: the rig's environment, started by ``python install.py bench``. It writes ``bench.json`` and
a picture of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench import (
    call_overhead,
    compiled,
    decoding,
    exchange,
    launches,
    overlap,
    plots,
    steps,
    xfuser_attention,
    xfuser_step,
)
from bench.rows import Row, about, text_of, write
from rig.environment import RigError
from rig.report import say
from rig.trees import Tree, obtain_tree

from comfy_xdit_patch.errors import CheckError

PIECES: dict[str, Callable[..., list[Row]]] = {
    "overhead": call_overhead.rows,
    "launches": launches.rows,
    "steps": steps.rows,
    "exchange": exchange.rows,
    "overlap": overlap.rows,
    "compiled": compiled.rows,
    "decode": decoding.rows,
    "attention": xfuser_attention.rows,
    "xfuser": xfuser_step.rows,
}


def main(arguments: list[str]) -> int:
    """Measure; 0 only if every piece was."""
    options = _parse(arguments)
    try:
        measure(obtain_tree(), options)
    except (RigError, CheckError) as error:
        sys.stderr.write(f"bench: failed: {error}\n")
        return 1
    return 0


def measure(tree: Tree, options: argparse.Namespace) -> list[Row]:
    """Measure the pieces asked for; what is measured is written before the next piece begins."""
    for folder in (options.out, options.plots):
        folder.mkdir(parents=True, exist_ok=True)
    setup = about(tree.version, is_quick=options.quick)
    say(f"ComfyUI {tree.version}, {setup['hardware']}")
    rows: list[Row] = []
    for name in options.only or PIECES:
        say(f"\n{name}\n")
        found = PIECES[name](tree, is_quick=options.quick)
        say(text_of(found))
        rows += found
        write(options.out / "bench.json", rows, setup)
        plots.draw(rows, setup, options.plots / "bench.png")
    say(f"\n{options.out / 'bench.json'}, {options.plots / 'bench.png'}")
    return rows


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="install.py bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="minutes instead of an hour")
    parser.add_argument("--out", type=Path, default=Path(), help="where bench.json is written")
    parser.add_argument("--plots", type=Path, help="where the picture is; default: as --out")
    parser.add_argument(
        "--only", nargs="+", choices=PIECES, metavar="PIECE", help=f"of {', '.join(PIECES)}"
    )
    options = parser.parse_args(arguments)
    options.plots = options.plots or options.out
    for folder in (options.out, options.plots):
        if folder.exists() and not folder.is_dir():
            parser.error(f"{folder} is not a directory")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
