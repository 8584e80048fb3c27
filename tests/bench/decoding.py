"""What ranks are worth that decode a picture together, beside ComfyUI alone.

Run: PYTHONPATH=tests python tests/bench/decoding.py [--gpus cpu:2] [--px 1024 2048] [--rounds N]

A VAE of FLUX.1's structure and width with random weights; ComfyUI's process and each rank have one
thread. Both ways take turns, and the first time of each does not count. Prints one JSON object for
each size: seconds of both ways, their ratio by the fastest, and how far the pictures are apart.
"""

from __future__ import annotations

import argparse
import json
import sys

from inside.client import Inside
from rig.trees import trees_for_tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="cpu:2")
    parser.add_argument("--px", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    env = {"XDIT_GPUS": options.gpus, "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
    inside = Inside(trees_for_tests()[-1], env)
    try:
        for px in options.px:
            (found,) = inside.call(
                "decoding:compare",
                sizes=[[1, px // 8, px // 8]],
                dtype=options.dtype,
                rounds=options.rounds,
                width=options.width,
            )
            found["ratio"] = min(found["one"][-options.rounds :]) / min(
                found["ranks"][-options.rounds :]
            )
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
    finally:
        inside.close()


if __name__ == "__main__":
    main()
