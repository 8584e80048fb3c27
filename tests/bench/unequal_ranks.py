"""Two ranks of which one is slowed: what adaptive shares reach of the ideal, and even ones.

Run: PYTHONPATH=tests python tests/bench/unequal_ranks.py [--speed 0.5] [--rounds N] [--calls N]

On a machine with two cores that are free. Each rank is pinned to a core of its own; rank 1 is
stopped and let go on 125 times a second, so that it runs ``speed`` of the time
(``rig/slowed.py``).

    full, slowed     one rank alone, at its own speed and slowed: the work of a call
    ideal            1 / (1 / full + 1 / slowed): both ranks always busy, nothing to exchange
    even, adaptive   the pair with rank 1 slowed, XDIT_BALANCE=even and adaptive
    equal            the pair with both at full speed, even and adaptive: what adaptive costs where
                     there is nothing to gain, and how often it changed shares

All of them take turns in every round; medians of all calls but the first of each run. Seconds are
the host's for one call. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from inside.client import Inside
from rig.slowed import Slowed
from rig.trees import Tree, trees_for_tests

SETTLE = 8


class Bench:
    """One ComfyUI process with its ranks, and the times of its calls."""

    def __init__(self, tree: Tree, gpus: str, strategy: str, path: str, side: int) -> None:
        env = {"XDIT_GPUS": gpus, "XDIT_STRATEGY": strategy, "XDIT_START_TIMEOUT": "400"}
        self._inside = Inside(tree, env)
        self._call = {"path": path, "height": side, "width": side, "batch": 1, "text_tokens": 256}
        self.seconds: dict[str, list[float]] = {}
        self.balances: dict[str, dict[str, Any]] = {}
        self.calls("warm-up", "even", 2)
        cores = sorted(os.sched_getaffinity(0))
        self._pids = [rank["pid"] for rank in self._inside.call("forwards:status")["ranks"]]
        for rank, pid in enumerate(self._pids):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {cores[rank % len(cores)]})

    def calls(self, name: str, mode: str, num_calls: int, *, speed: float = 1.0) -> None:
        """Make a run of calls under the balance of this name; the first one does not count."""
        self._inside.call("steering:use_balance", name=name, mode=mode)
        with Slowed(self._pids[-1], speed) if speed < 1 else nullcontext():
            times = self._inside.call("forwards:run_of_calls", calls=1 + num_calls, **self._call)
        self.seconds.setdefault(name, []).extend(t["host"] for t in times[1:])
        self.balances[name] = self._inside.call("forwards:status")["weights"]

    def forward(self, out: Path) -> torch.Tensor:
        """Compute one call; return what came out of it."""
        self._inside.call("forwards:forward", out=str(out), **self._call)
        result: torch.Tensor = torch.load(out)
        return result

    def median(self, name: str) -> float:
        return round(statistics.median(self.seconds[name]), 4)

    def close(self) -> None:
        self._inside.close()


def write_model(tree: Tree, path: str, *, hidden: int, blocks: int, context: int = 512) -> None:
    """Write a FLUX.1-dev of so many double and as many single blocks."""
    stock = Inside(tree, {"XDIT_STRATEGY": "off"})
    sizes = {"hidden": hidden, "double": blocks, "single": blocks, "context": context}
    stock.call("families:write_model", path=path, family="dev", **sizes)
    stock.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--strategy", default="ulysses")
    parser.add_argument("--blocks", type=int, default=1, help="double and single ones each")
    parser.add_argument("--hidden", type=int, default=1536, help="features; 128 are a head")
    parser.add_argument("--side", type=int, default=72, help="of the latent; a token is 2 x 2")
    options = parser.parse_args()
    speed, num_calls, tree = options.speed, options.calls, trees_for_tests()[-1]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        write_model(tree, path, hidden=options.hidden, blocks=options.blocks)
        one = Bench(tree, "cpu:1", options.strategy, path, options.side)
        pair = Bench(tree, "cpu:2", options.strategy, path, options.side)
        try:
            pair.calls("adaptive", "adaptive", SETTLE, speed=speed)
            pair.calls("equal, adaptive", "adaptive", SETTLE)
            learning = {name: times.copy() for name, times in pair.seconds.items()}
            pair.seconds.clear()
            for _ in range(options.rounds):
                one.calls("full", "even", num_calls)
                one.calls("slowed", "even", num_calls, speed=speed)
                pair.calls("even", "even", num_calls, speed=speed)
                pair.calls("adaptive", "adaptive", num_calls, speed=speed)
                pair.calls("equal, even", "even", num_calls)
                pair.calls("equal, adaptive", "adaptive", num_calls)
        finally:
            one.close()
            pair.close()
    full, slowed = one.median("full"), one.median("slowed")
    ideal_s = 1 / (1 / full + 1 / slowed)
    times = {name: pair.median(name) for name in pair.seconds}
    report = {
        **vars(options),
        "one_rank_s": {"full": full, "slowed": slowed, "speed": round(full / slowed, 3)},
        "ideal_s": round(ideal_s, 4),
        "pair_s": times,
        "of_ideal": {name: round(ideal_s / times[name], 3) for name in ("even", "adaptive")},
        "of_ideal_of_equal_ranks": {
            name: round(full / 2 / times[name], 3) for name in ("equal, even", "equal, adaptive")
        },
        "balance": pair.balances,
        "learning_s": {name: [round(s, 3) for s in times] for name, times in learning.items()},
    }
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
