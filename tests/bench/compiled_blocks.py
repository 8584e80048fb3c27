"""What a step takes with blocks as they are and compiled, in ComfyUI alone and on CPU ranks.

Run: PYTHONPATH=tests python tests/bench/compiled_blocks.py [--side 32] [--steps 9]

Blocks of FLUX.1's real width (3072, 24 heads), one double and one single, a latent of ``side`` x
``side``, 256 text tokens, float32. The first step compiles and is given apart; the median of the
others. CPU ranks say what is fused and nothing of launches, which a GPU is for. One JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from inside.client import Inside
from rig.checkpoints import Sizes, models_directory
from rig.trees import trees_for_tests

PROCESSES = {"2 ranks": {"XDIT_GPUS": "cpu:2"}, "ComfyUI alone": {"XDIT_STRATEGY": "off"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    tree = trees_for_tests()[-1]
    models = models_directory(Sizes(hidden=3072, double=1, single=1))
    path = str(models / "diffusion_models/flux1-dev.safetensors")
    size = {"height": options.side, "width": options.side, "batch": 1, "text_tokens": 256}
    results: dict[str, Any] = {"comfyui": tree.version, **vars(options)}
    for name, env in PROCESSES.items():
        inside = Inside(tree, {**env, "XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"})
        for backend in (None, "inductor"):
            seconds = []
            for seed in range(options.steps):
                begin = time.perf_counter()
                steps = [{**size, "seed": seed}]
                found = inside.call(
                    "compiled:calls", path=path, out="/dev/null", calls=steps, backend=backend
                )[0]
                seconds.append(time.perf_counter() - begin)
            way = f"{name}, {backend or 'as it is'}"
            results[way] = {
                "first_s": round(seconds[0], 2),
                "step_ms": round(1000 * statistics.median(seconds[1:]), 1),
                "blocks_compiled": [rank["blocks_compiled"] for rank in found.get("ranks", [])],
            }
            print(way, results[way], file=sys.stderr)  # noqa: T201 - it takes minutes
        inside.close()
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
