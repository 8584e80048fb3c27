"""The first image after a start of ComfyUI: stock against ours, side by side.

Runs in: the rig's environment.

    PYTHONPATH=tests python tests/bench/first_image.py --rounds 5 --ranks 2 --steps 20 --wait 0

Each round starts a server of each kind, waits, and queues one prompt. Printed are seconds from the
queue to the image, medians of all rounds, and how many steps were parallel.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.report import say
from rig.server import Server, base_directory
from rig.trees import trees_for_tests

DEADLINE_S = 600.0


def main() -> None:
    """Measure, and print a line for each round and one for all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds from start to prompt")
    options = parser.parse_args()
    kinds = {
        "stock": {"XDIT_STRATEGY": "off"},
        "early": {"XDIT_GPUS": f"cpu:{options.ranks}", "XDIT_START": "early"},
        "first": {"XDIT_GPUS": f"cpu:{options.ranks}", "XDIT_START": "first"},
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for kind, env in kinds.items():
            took, said = first_image(env, options, seed=number)
            seconds[kind].append(took)
            say(f"{number} {kind}: {took:.1f} s{said}")
    for kind, times in seconds.items():
        say(f"median {kind}: {statistics.median(times):.1f} s")


def first_image(
    env: dict[str, str], options: argparse.Namespace, *, seed: int
) -> tuple[float, str]:
    """Return the seconds of a new server's first prompt, and what it says of its steps."""
    graph = graphs.with_values(
        graphs.load("ksampler_dev"),
        seed=seed,
        size=(options.side, options.side),
        steps=options.steps,
    )
    models = models_directory(Sizes(hidden=options.hidden))
    tree = trees_for_tests()[-1]
    with (
        tempfile.TemporaryDirectory() as folder,
        base_directory(Path(folder), models) as base,
        Server(tree, base, env=env, is_cold=True) as server,
    ):
        time.sleep(options.wait)
        start = time.monotonic()
        server.run(graph, DEADLINE_S)
        took = time.monotonic() - start
        if env.get("XDIT_STRATEGY") == "off":
            return took, ""
        run = server.status()["last_run"]
        return took, f", {run['steps_parallel']} of {run['steps']} steps parallel"


if __name__ == "__main__":
    main()
