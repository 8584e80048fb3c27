"""How much of the package one step enters, in the host and in a rank.

Run: PYTHONPATH=tests python tests/bench/step_trace.py [--functions]

FLUX.1-dev of two double and two single blocks on 2 CPU ranks, ``XDIT_STRATEGY=ulysses``, the fifth
step of a run: nothing is loaded, measured or started. Prints one JSON object: files, functions,
calls, and how often a call goes to another file than the call before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inside.client import Inside
from rig.trees import trees_for_tests

Entered = Sequence[Sequence[str]]
STEP = 5
MODEL = {"family": "dev", "hidden": 256, "double": 2, "single": 2, "context": 256}
SIZES = {"height": 32, "width": 32, "batch": 1, "text_tokens": 64}


def figures(entered: Entered) -> dict[str, int]:
    """Count what was entered."""
    files = [file for file, _ in entered]
    return {
        "files": len(set(files)),
        "functions": len({(file, name) for file, name in entered}),
        "calls": len(entered),
        "changes_of_file": sum(a != b for a, b in itertools.pairwise(files)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions", action="store_true", help="list them, in order of entry")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks = {"XDIT_GPUS": "cpu:2", "XDIT_STRATEGY": "ulysses", "XDIT_START_TIMEOUT": "400"}
        inside = Inside(trees_for_tests()[-1], {**ranks, "RIG_TRACE": folder})
        path = os.path.join(folder, "model.safetensors")
        inside.call("families:write_model", path=path, **MODEL)
        host = inside.call("traced:step", path=path, number=STEP, **SIZES)
        pid = inside.call("forwards:status")["ranks"][0]["pid"]
        rank = json.loads(Path(folder, f"{pid}.json").read_text())
        inside.close()
    both = {file for file, _ in (*host, *rank)}
    found = {"host": figures(host), "rank 0": figures(rank), "files of both": len(both)}
    if options.functions:
        found["entered"] = {  # type: ignore[assignment]
            name: list(dict.fromkeys(f"{file}: {function}" for file, function in entered))
            for name, entered in (("host", host), ("rank 0", rank))
        }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
