"""How often ``auto`` takes the fastest way, and what that costs: a quiet and a loaded machine.

Runs in: the rig's environment; ComfyUI and its ranks are processes of their own.

Two CPU ranks, one core each, and ComfyUI alone on one core. On the loaded machine a process pinned
to core 0 works a third of the time. On each of the two, every way is timed by name, and then
``auto`` forgets, measures anew in an image, and makes another one as it decided, so many times:

    python tests/bench/auto.py --trials 10

Printed are, for each trial, what was taken, and how much longer the image of the trial took than
the next, in steps of that; then all of them together. Seconds are of whole prompts, with text
encoder and VAE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.report import say
from rig.server import Server, base_directory
from rig.trees import trees_for_tests

DEADLINE_S = 900.0
SETTINGS = {"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": "400"}
NAMED = ("ulysses=2", "ring=2")
WORK = """
import time
while True:
    end = time.time() + {on_s}
    while time.time() < end:
        pass
    time.sleep({off_s})
"""
ON_S, OFF_S = 1.0, 2.0


@contextmanager
def load(is_wanted: bool) -> Iterator[None]:
    """A process that works on core 0, a third of the time."""
    if not is_wanted:
        yield
        return
    body = WORK.format(on_s=ON_S, off_s=OFF_S)
    process = subprocess.Popen(["taskset", "--cpu-list", "0", sys.executable, "-c", body])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Bench:
    """A ComfyUI with ranks, its settings changed from image to image."""

    def __init__(self, server: Server, base: Path, *, side: int, num_steps: int) -> None:
        self._server = server
        self._verdicts = base / "cache" / "comfy-xdit-patch" / "verdicts.json"
        self._side, self._num_steps = side, num_steps
        self._seed = 0

    def have(self, strategy: str, number: int) -> None:
        """Begin anew with a strategy; ``number`` makes the settings new."""
        settings = {"XDIT_STRATEGY": strategy, "XDIT_START_TIMEOUT": str(400 + number)}
        self._server.have(SETTINGS | settings)

    def image_s(self, *, side: int | None = None) -> float:
        """Make an image; return the seconds of its prompt."""
        self._seed += 1
        size, steps = side or self._side, self._num_steps if side is None else 1
        graph = graphs.with_values(
            graphs.load("ksampler_dev"), seed=self._seed, size=(size, size), steps=steps
        )
        begin = time.perf_counter()
        self._server.run(graph, DEADLINE_S)
        return time.perf_counter() - begin

    def trial(self, number: int) -> tuple[str, float]:
        """Have everything measured; return what was taken, and what that cost, in steps."""
        self._verdicts.unlink(missing_ok=True)
        self.have("auto", number)
        self.image_s(side=64)  # The workers are there before. One step of it is no trial.
        first_s, next_s = self.image_s(), self.image_s()
        (found,) = json.loads(self._verdicts.read_text())["verdicts"].values()
        paces = {way: pace["fastest_s"] for way, pace in found["paces"].items()}
        taken = min(paces, key=paces.__getitem__)
        return taken, (first_s - next_s) / next_s * self._num_steps


def by_name(
    bench: Bench, stock: Bench, num_images: int, numbers: Iterator[int]
) -> dict[str, float]:
    """Median seconds of an image, by each way: in turn, as the machine may change meanwhile."""
    found: dict[str, list[float]] = {way: [] for way in (*NAMED, "one")}
    for _ in range(num_images):
        for way, seconds in found.items():
            server = stock if way == "one" else bench
            if server is bench:
                bench.have(way, next(numbers))
            server.image_s(side=64)
            seconds.append(server.image_s())
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def main() -> int:
    """Run it; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="on each of the two machines")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=3, help="of each way by name")
    options = parser.parse_args()
    models, tree = models_directory(Sizes(hidden=options.hidden)), trees_for_tests()[-1]
    sizes = {"side": options.size, "num_steps": options.steps}
    with (
        tempfile.TemporaryDirectory() as folder,
        base_directory(Path(folder) / "stock", models) as stock_base,
        base_directory(Path(folder) / "auto", models) as base,
        Server(tree, stock_base, env={"XDIT_STRATEGY": "off"}) as stock_server,
        Server(tree, base, env=SETTINGS | {"XDIT_STRATEGY": "auto"}) as server,
    ):
        stock, bench = Bench(stock_server, stock_base, **sizes), Bench(server, base, **sizes)
        numbers = itertools.count(1)
        for is_loaded in (False, True):
            machine = "loaded" if is_loaded else "quiet"
            with load(is_loaded):
                named = by_name(bench, stock, options.images, numbers)
                fastest = min(named, key=named.__getitem__)
                text = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in named.items())
                say(f"{machine}, by name: {text}")
                taken, costs = [], []
                for _ in range(options.trials):
                    way, cost = bench.trial(next(numbers))
                    taken.append(way)
                    costs.append(cost)
                    say(f"{machine}  {way:<10} {cost:5.1f} steps")
            say(
                f"{machine}: {fastest} is the fastest, and was taken {taken.count(fastest)} of "
                f"{len(taken)} times; a trial cost {statistics.median(costs):.1f} steps of "
                f"{options.steps} (from {min(costs):.1f} to {max(costs):.1f})"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
