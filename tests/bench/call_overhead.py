"""What one parallel call costs beside the model: message, copies, wake-up.

Run: PYTHONPATH=tests python tests/bench/call_overhead.py [--ranks N] [--calls N]

A 1024 x 1024 latent and FLUX.1's real conditioning sizes (256 text tokens of 4096), a model so
narrow that its own time hardly matters. The host's time of a step minus the slowest rank's, which
counts from the arrival of the message to the written result. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile

from inside.client import Inside
from rig.trees import trees_for_tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--calls", type=int, default=40)
    options = parser.parse_args()
    results = {}
    for tree in trees_for_tests():
        inside = Inside(tree, {"XDIT_GPUS": f"cpu:{options.ranks}", "XDIT_START_TIMEOUT": "400"})
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/narrow.safetensors"
            model = {"family": "dev", "hidden": 128, "double": 1, "single": 1, "context": 4096}
            inside.call("families:write_model", path=path, **model)
            sizes = {"height": 128, "width": 128, "batch": 1, "text_tokens": 256}
            times = inside.call(
                "forwards:run_of_calls", path=path, calls=options.calls + 5, **sizes
            )[5:]
        start = inside.call("forwards:status")["ranks"][0]["start_s"]
        inside.close()
        overheads = [1000 * (t["host"] - max(t["ranks"].values())) for t in times]
        results[tree.version] = {
            "overhead_ms": {
                "median": round(statistics.median(overheads), 2),
                "min": round(min(overheads), 2),
                "p95": round(sorted(overheads)[int(0.95 * len(overheads))], 2),
            },
            "step_ms_median": round(1000 * statistics.median(t["host"] for t in times), 1),
            "start_s_of_rank_0": start,
        }
    json.dump({"ranks": options.ranks, "calls": options.calls, **results}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
