"""A step with the model compiled by inductor, against the same step as it is.

Runs in: the rig's environment; ComfyUI alone and with its ranks are processes of their own.

ComfyUI alone compiles its whole model, as its node TorchCompileModel has it; ranks compile each of
their blocks. All ways take turns in every round, and each process has one thread.
"""

from __future__ import annotations

import shutil
import tempfile

import torch
from bench.rows import Row, compared
from inside.client import Inside
from rig.trees import Tree

NUM_RANKS, NUM_WARM_UP = 2, 2
MODEL = {"family": "dev", "hidden": 1024, "double": 1, "single": 2, "context": 4096}
SIZES = {"height": 64, "width": 64, "batch": 1, "text_tokens": 256}
RANKS, ALONE = f"{NUM_RANKS} CPU ranks", "ComfyUI alone"
COMPILED, EAGER = "inductor", None


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """Steps of ranks and of ComfyUI alone, compiled and as they are."""
    about = "512 px, width 1024, 1 + 2 blocks"
    if shutil.which("g++") is None:
        return [Row(f"compiled step, {about}", None, "s", parity="no C++ compiler for inductor")]
    num_rounds = NUM_WARM_UP + (5 if is_quick else 15)
    ranks = {"XDIT_GPUS": f"cpu:{NUM_RANKS}", "XDIT_STRATEGY": "ulysses", "XDIT_STRICT": "1"}
    processes = {
        ALONE: Inside(tree, {"XDIT_STRATEGY": "off"}),
        RANKS: Inside(tree, {**ranks, "XDIT_START_TIMEOUT": "400"}),
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, out = f"{folder}/model.safetensors", f"{folder}/out.pt"
            processes[ALONE].call("families:write_model", path=path, **MODEL)
            seconds: dict[tuple[str, str | None], list[float]] = {}
            errors: dict[tuple[str, str | None], float] = {}
            for number in range(num_rounds):
                for backend in (EAGER, COMPILED):
                    for name, process in processes.items():
                        given = {"path": path, "out": out, "backend": backend, "seed": number}
                        took = process.call("compiled:step", **given, **SIZES)
                        if number >= NUM_WARM_UP:
                            seconds.setdefault((name, backend), []).append(took)
                        found = torch.load(out)
                        if (name, backend) == (ALONE, EAGER):
                            expected = found
                        error = ((found - expected).abs().max() / expected.abs().max()).item()
                        errors[name, backend] = max(error, errors.get((name, backend), 0.0))
    finally:
        for process in processes.values():
            process.close()
    pairs = [
        (f"step of {RANKS}, {about}: compiled against as it is", (RANKS, COMPILED), (RANKS, EAGER)),
        (f"the same of {ALONE}", (ALONE, COMPILED), (ALONE, EAGER)),
        (f"the same as it is: {RANKS} against {ALONE}", (RANKS, EAGER), (ALONE, EAGER)),
        (f"the same compiled: {RANKS} against {ALONE}", (RANKS, COMPILED), (ALONE, COMPILED)),
    ]
    return [
        compared(name, "s", seconds[one], seconds[other], f"{errors[one]:.1e}")
        for name, one, other in pairs
    ]
