"""What sharded weights cost on CPU ranks: time of a forward, waits for gathers, memory.

Run: PYTHONPATH=tests python tests/bench/weight_sharding.py [--ranks 2 4] [--hidden 1536]

The newest ComfyUI found; every rank computes the same 256 + 256 tokens. CPU ranks share one
machine's memory bandwidth, so that the gathers here say little about cards. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile

from inside.client import Inside
from rig.trees import trees_for_tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, default=1536)
    options = parser.parse_args()
    tree = trees_for_tests()[-1]
    running = [Inside(tree, {"XDIT_STRATEGY": "off"}) for _ in range(max(options.ranks))]
    results = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.safetensors"
            model = {"family": "dev", "hidden": options.hidden, "context": 64}
            running[0].call("families:write_model", path=path, double=2, single=4, **model)
            for num_ranks in options.ranks:
                call = {"path": path, "store": f"{folder}/{num_ranks}", "world_size": num_ranks}
                for rank, process in enumerate(running[:num_ranks]):
                    process.start_call(
                        "sharding:cost", rank=rank, options={"dtype": "bfloat16"}, **call
                    )
                answers = [process.finish_call() for process in running[:num_ranks]]
                results[num_ranks] = {
                    name: [answer[name] for answer in answers] for name in answers[0]
                }
    finally:
        for process in running:
            process.close()
    json.dump({"comfyui": tree.version, "hidden": options.hidden, **results}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
