"""What ``auto`` chooses, and what it costs: stock ComfyUI on one core beside it, size by size.

A CPU device here is one core. Two servers take turns, image by image, on a quiet machine:

    python tests/bench/auto.py                  two ranks on two cores
    python tests/bench/auto.py --cores 0        two ranks on the same core

Every size is made ``--images`` times; the first one has the trial of ``auto`` in it. Printed are
seconds of a whole prompt, with text encoder and VAE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.report import say
from rig.server import Server, base_directory
from rig.trees import trees_for_tests

SIDES = (
    *((128, 128), (192, 128), (192, 192), (256, 192), (256, 256)),
    *((320, 256), (320, 320), (384, 320), (384, 384), (448, 384)),
)
DEADLINE_S = 900.0


def main() -> int:
    """Run it; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cores", default="0,1", help="of the server with ranks")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=3)
    options = parser.parse_args()
    tree = trees_for_tests()[-1]
    models = models_directory(Sizes(hidden=options.hidden))
    ranks_env = {"XDIT_GPUS": "cpu:2", "XDIT_STRATEGY": "auto", "XDIT_START_TIMEOUT": "400"}
    pin = ("taskset", "--cpu-list")
    seconds: dict[str, list[list[float]]] = {"stock": [], "auto": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        base_directory(Path(folder) / "stock", models) as stock_base,
        base_directory(Path(folder) / "auto", models) as auto_base,
        Server(tree, stock_base, env={"XDIT_STRATEGY": "off"}, within=(*pin, "0")) as stock,
        Server(tree, auto_base, env=ranks_env, within=(*pin, options.cores)) as auto,
    ):
        servers = {"stock": stock, "auto": auto}
        base = graphs.load("ksampler_dev")
        for server in servers.values():  # text encoder, VAE and workers are there before
            server.run(graphs.with_values(base, seed=1, size=(64, 64), steps=1), DEADLINE_S)
        while auto.status()["state"] != "ready":
            time.sleep(0.2)
        say(f"{'size':>9}  {'stock s':>24}  {'auto s':>24}  first  rest  what auto took")
        for width, height in SIDES:
            taken: dict[str, list[float]] = {"stock": [], "auto": []}
            for image in range(options.images):
                graph = graphs.with_values(
                    base, seed=10 + image, size=(width, height), steps=options.steps
                )
                for name, server in servers.items():
                    start = time.perf_counter()
                    server.run(graph, DEADLINE_S)
                    taken[name].append(time.perf_counter() - start)
            for name, values in taken.items():
                seconds[name].append(values)
            run = auto.status()["last_run"]
            what = run["plan"] if run["steps_parallel"] else "one"
            columns = [" ".join(f"{s:6.2f}" for s in taken[name]) for name in servers]
            first = taken["stock"][0] / taken["auto"][0]
            rest = statistics.median(taken["stock"][1:]) / statistics.median(taken["auto"][1:])
            say(
                f"{width}x{height:<4}  {columns[0]:>24}  {columns[1]:>24}  {first:4.2f}x "
                f"{rest:4.2f}x  {what}",
            )
    for name, part in (("first images", slice(0, 1)), ("later images", slice(1, None))):
        totals = {kind: sum(sum(v[part]) for v in values) for kind, values in seconds.items()}
        say(
            f"{name}: stock {totals['stock']:.1f} s, auto {totals['auto']:.1f} s: "
            f"{totals['stock'] / totals['auto']:.2f}x"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
