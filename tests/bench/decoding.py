"""What ranks are worth that decode a picture together, whole or in tiles, beside ComfyUI alone.

Runs in: the rig's environment. ``install.py bench --only decode`` runs it, and so does

    PYTHONPATH=tests python tests/bench/decoding.py [--px 1024 2048] [--tile 64] [--rounds N] ...

which prints one JSON object for each size. A VAE has FLUX.1's structure, its width or a fourth of
it, and random weights; ComfyUI's process and each rank have one thread. Both ways take turns in
every round, and the first round does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.rows import Row, compared
from inside.client import Inside
from rig.report import say
from rig.trees import Tree, trees_for_tests

WIDTH, NARROW = 128, 32
TILE = 64
"""Of the latent: what ComfyUI's node for it takes."""


@dataclass(frozen=True)
class Case:
    """A square picture: ``tile`` is 0 where it is decoded whole."""

    px: int
    tile: int
    width: int
    dtype: str


QUICK = (Case(1024, 0, NARROW, "float32"), Case(1024, TILE, NARROW, "float32"))
# Tiles take four times as long, and 2048 px in float32 more memory than many machines have.
TRUE = (
    Case(1024, 0, WIDTH, "float32"),
    Case(1024, 0, WIDTH, "bfloat16"),
    Case(1024, TILE, WIDTH, "bfloat16"),
    Case(2048, 0, WIDTH, "bfloat16"),
)


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """Decoding of each size by two CPU ranks, against ComfyUI alone."""
    found = []
    with _ranks(tree, "cpu:2") as inside:
        for case in QUICK if is_quick else TRUE:
            turns = measured(inside, case, num_rounds=2 if is_quick else 1)
            how = f"in tiles of {8 * case.tile} px" if case.tile else "whole"
            name = f"VAE decode of {case.px} px {how}, width {case.width}, {case.dtype}"
            worst = max(turn["largest difference"] for turn in turns)
            found.append(
                compared(
                    f"{name}: 2 CPU ranks against ComfyUI alone",
                    "s",
                    [turn["ranks"] for turn in turns],
                    [turn["one"] for turn in turns],
                    f"{worst:.1e}" if worst else "same bits",
                )
            )
    return found


def measured(inside: Inside, case: Case, num_rounds: int) -> list[dict[str, Any]]:
    """Decode in both ways in every round, after one that does not count."""
    turns = []
    for number in range(num_rounds + 1):
        turn = inside.call(
            "decoding:compare",
            size=[1, case.px // 8, case.px // 8],
            dtype=case.dtype,
            width=case.width,
            tile=case.tile,
        )
        say(f"{case}, round {number}: {turn['ranks']:.2f} s, ComfyUI alone {turn['one']:.2f} s")
        turns.append(turn)
    return turns[1:]


@contextmanager
def _ranks(tree: Tree, gpus: str) -> Iterator[Inside]:
    env = {"XDIT_GPUS": gpus, "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
    inside = Inside(tree, env)
    try:
        yield inside
    finally:
        inside.close()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="cpu:2")
    parser.add_argument("--px", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tile", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=WIDTH)
    options = parser.parse_args(arguments)
    with _ranks(trees_for_tests()[-1], options.gpus) as inside:
        for px in options.px:
            case = Case(px, options.tile, options.width, options.dtype)
            for turn in measured(inside, case, options.rounds):
                sys.stdout.write(json.dumps({**vars(case), **turn}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
