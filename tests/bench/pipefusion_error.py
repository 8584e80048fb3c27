"""How far PipeFusion's images are from one GPU's: samplers against patches, depth and warm-up.

Run: PYTHONPATH=tests python tests/bench/pipefusion_error.py [--size PX] [--steps N] [--json FILE]

Real samplers of ComfyUI, a model of the rig (random weights, 2 + 2 blocks), 4 CPU ranks, a decoded
image. Prints a table in Markdown for docs/pipefusion.md. The models are random: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inside.client import Inside
from rig.checkpoints import Sizes, models_directory
from rig.compare import compare
from rig.trees import trees_for_tests

SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral")
STAGES_2, STAGES_4 = "pipefusion=2,ulysses=2", "pipefusion=4"
CASES = [  # plan, patches, exact calls, part of the steps
    (STAGES_2, 2, 1, 1.0),
    (STAGES_2, 4, 1, 1.0),
    (STAGES_2, 8, 1, 1.0),
    (STAGES_4, 4, 1, 1.0),
    (STAGES_4, 8, 1, 1.0),
    (STAGES_2, 4, 2, 1.0),
    (STAGES_2, 4, 5, 1.0),
    (STAGES_2, 4, 1, 0.5),
    (STAGES_2, 4, 1, 2.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = models_directory(Sizes(hidden=512, double=2, single=2))
    image: dict[str, Any] = {
        "path": str(models / "diffusion_models/flux1-dev.safetensors"),
        "vae": str(models / "vae/ae.safetensors"),
        "size": options.size,
    }
    tree = trees_for_tests()[-1]
    strict = {"XDIT_STRICT": "1", "XDIT_START_TIMEOUT": "400"}
    stock = Inside(tree, {"XDIT_STRATEGY": "off"})
    ranks = Inside(tree, {"XDIT_GPUS": "cpu:4", "XDIT_STRATEGY": "pipefusion", **strict})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for plan, patches, warm_up, part in CASES:
            ranks.call("steering:use_strategy", text=plan)
            ranks.call("pipelined:use_pipeline", num_patches=patches, warm_up=warm_up)
            row: dict[str, Any] = {"plan": plan, "patches": patches, "warm_up": warm_up}
            for sampler in SAMPLERS:
                run = image | {"sampler": sampler, "steps": int(part * options.steps)}
                expected = Path(folder) / f"{sampler} {run['steps']}.pt"
                if not expected.exists():
                    stock.call("pipelined:image", out=str(expected), **run)
                found = Path(folder) / "ranks.pt"
                status = ranks.call("pipelined:image", out=str(found), **run)
                last = status["last_run"]
                assert (last["steps_parallel"], last["plan"]) == (run["steps"], plan), last
                assert last["steps_warm_up"] == warm_up
                row["steps"] = run["steps"]
                row[sampler] = errors(expected, found)
            rows.append(row)
            sys.stderr.write(f"{json.dumps(row)}\n")
    stock.close()
    ranks.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    sys.stdout.write(table(rows))


def errors(stock: Path, ranks: Path) -> dict[str, float]:
    """Compare two results of ``pipelined:image``."""
    (latent, pixels), (other, other_pixels) = torch.load(stock), torch.load(ranks)
    difference = compare(as_pixels(pixels), as_pixels(other_pixels))
    return {
        "latent": ((latent - other).norm() / latent.norm()).item(),
        "psnr_db": difference.psnr_db,
        "max_pixel": difference.max_pixel,
    }


def as_pixels(image: torch.Tensor) -> np.ndarray[Any, Any]:
    return (image * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def table(rows: list[dict[str, Any]]) -> str:
    head = ["plan", "patches", "exact calls", "steps", *SAMPLERS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["plan"], row["patches"], row["warm_up"], row["steps"]]
        cells += [f"{row[s]['latent']:.1e}, {row[s]['psnr_db']:.1f} dB" for s in SAMPLERS]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
