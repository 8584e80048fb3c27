"""A step of FLUX in a ComfyUI server: every strategy by name, against ComfyUI alone.

Runs in: the rig's environment. Servers run one after the other, so that none is timed beside
another: a way's turn is a server, a warm-up image, and an image that counts, and all ways take
turns in every round. What is timed, and the latent that is compared, are those of ``comfy-xdit
check``: from the first step of an image to its last, behind all kernels.

On two or more GPUs all visible ones are ranks, and the model has FLUX.1's own width: whole where
every card has room for it, else 2 + 4 of its 57 blocks. Without them ranks are processes on the
CPU, of one thread as ComfyUI alone, and the model is as narrow as the demo's.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench.rows import Row, compared, rounded
from rig.environment import RigError
from rig.report import say
from rig.server import Server, base_directory
from rig.status_schema import counted
from rig.trees import Tree

from comfy_xdit_patch.check.comparison import compare, read_latent
from comfy_xdit_patch.check.graph import MODEL_NAME, graph, latent_file, seconds_per_step
from comfy_xdit_patch.check.machine import find_machine
from comfy_xdit_patch.check.model_file import Sizes, file_bytes, write_model
from comfy_xdit_patch.check.server import PACK

NARROW, FEW, TRUE = Sizes(1024, 1, 1), Sizes(3072, 2, 4), Sizes(3072, 19, 38)
ROOM_BYTES = 4 << 30
"""On a card beside the weights: contexts, communicators, what a call computes with."""
DEADLINE_S = 1200.0
WARM_UP_STEPS, SEED = 2, 2
CFG = 3.0
ONE = "ComfyUI alone"
ONE_CFG = f"{ONE}, CFG"


@dataclass(frozen=True)
class Setup:
    """What all turns have in common."""

    tree: Tree
    models: Path
    folder: Path
    device: str
    num_ranks: int
    size_px: int
    num_steps: int


@dataclass(frozen=True)
class Way:
    """How a step is computed: the strategy, and ComfyUI's own threads where they are not one."""

    name: str
    strategy: str
    baseline: str
    has_cfg: bool = False
    num_threads: int = 1


@dataclass(frozen=True)
class Turn:
    """What one image told; zeros of ComfyUI alone."""

    step_s: float
    latent: torch.Tensor
    outside_ms: float = 0.0
    """Of the last step, what its slowest rank did not have."""
    inside_ms: float = 0.0
    rank_bytes: float = 0.0
    """That a rank sent to others in a step."""


def ways_for(num_ranks: int, *, has_threads: bool) -> list[Way]:
    """Name the ways of so many ranks, each behind its baseline."""
    ways = [Way(ONE, "off", ONE)]
    if has_threads:
        ways.append(Way(f"{ONE}, {num_ranks} threads", "off", ONE, num_threads=num_ranks))
    ways += [Way(name, name, ONE) for name in ("ulysses", "ring", "tensor")]
    if num_ranks % 2 == 0:
        rest = f",ulysses={num_ranks // 2}" if num_ranks > 2 else ""
        ways.append(Way(ONE_CFG, "off", ONE_CFG, has_cfg=True))
        ways.append(Way(f"batch with CFG{rest}", f"batch=2{rest}", ONE_CFG, has_cfg=True))
    return ways


def rows(tree: Tree, *, is_quick: bool) -> list[Row]:
    """Steps of each way, what they cost outside of the ranks, and the bytes between ranks."""
    num_rounds = 3 if is_quick else 4
    with _setup(tree, is_quick=is_quick) as (setup, sizes):
        ways = ways_for(setup.num_ranks, has_threads=setup.device == "cpu" and not is_quick)
        turns: dict[str, list[Turn]] = {way.name: [] for way in ways}
        refused: dict[str, str] = {}
        for number in range(num_rounds):
            for way in ways:
                if way.name not in refused:
                    try:
                        turn = _turn(setup, way)
                        say(f"round {number + 1}, {way.name}: {turn.step_s:.3f} s a step")
                        turns[way.name].append(turn)
                    except RigError as error:
                        if way.name == way.baseline:
                            raise
                        refused[way.name] = str(error).splitlines()[0]
    about = (
        f"{setup.num_ranks} {setup.device.upper()} ranks, {setup.size_px} px, "
        f"width {sizes.width}, {sizes.num_double} + {sizes.num_single} blocks"
    )
    return [row for way in ways for row in _rows_of(way, turns, refused, about)]


def _rows_of(
    way: Way, turns: dict[str, list[Turn]], refused: dict[str, str], about: str
) -> Iterator[Row]:
    name = f"step of {about}: {way.name} against {way.baseline}"
    if way.name in refused:
        yield Row(name, None, "s", parity=refused[way.name])
        return
    if way.name == way.baseline:
        return
    found, baseline = turns[way.name], turns[way.baseline]
    pairs = [(turn.step_s, other.step_s) for turn, other in zip(found, baseline, strict=True)]
    worst = max(
        (compare(other.latent, turn.latent) for turn, other in zip(found, baseline, strict=True)),
        key=lambda difference: difference.max_error,
    )
    psnr = "same bits" if worst.psnr_db is None else f"PSNR {worst.psnr_db:.1f} dB"
    yield compared(name, "s", *zip(*pairs, strict=True), f"{worst.max_error:.1e}, {psnr}")
    if way.strategy != "off":
        yield compared(
            f"step of {about}: {way.name}, outside of the ranks against inside",
            "ms",
            [turn.outside_ms for turn in found],
            [turn.inside_ms for turn in found],
        )
        sent = statistics.median(turn.rank_bytes for turn in found)
        name = f"step of {about}: {way.name}, bytes that a rank sends"
        yield Row(name, rounded(sent), "B", parity="counted")


@contextmanager
def _setup(tree: Tree, *, is_quick: bool) -> Iterator[tuple[Setup, Sizes]]:
    machine = find_machine() if torch.cuda.device_count() > 1 else None
    sizes = NARROW
    with tempfile.TemporaryDirectory(prefix="xdit-bench-") as at:
        folder = Path(at)
        if machine is not None:
            room = min(gpu.memory_bytes for gpu in machine.gpus) - ROOM_BYTES
            room = min(room, shutil.disk_usage(folder).free)
            sizes = FEW if is_quick or file_bytes(TRUE) > room else TRUE
        models = folder / "models"
        (models / "diffusion_models").mkdir(parents=True)
        write_model(models / "diffusion_models" / MODEL_NAME, sizes)
        setup = Setup(
            tree=tree,
            models=models,
            folder=folder,
            device="cpu" if machine is None else "gpu",
            num_ranks=2 if machine is None else len(machine.gpus),
            size_px=512 if machine is None else 1024,
            num_steps=5 if machine is None and is_quick else 20,
        )
        yield setup, sizes


def _turn(setup: Setup, way: Way) -> Turn:
    """Have a server make a short image with another seed, and then the one that counts."""
    env = {"XDIT_STRATEGY": way.strategy, "XDIT_STRICT": "1"}
    is_ours = way.strategy != "off"
    if is_ours:
        prefix = "cpu:" if setup.device == "cpu" else ""
        env["XDIT_GPUS"] = f"{prefix}{setup.num_ranks}"
    with (
        base_directory(setup.folder / "server", setup.models) as base_dir,
        Server(
            setup.tree,
            base_dir,
            env=env,
            device=setup.device,
            threads=way.num_threads if setup.device == "cpu" else None,
            node_packs=[PACK],
        ) as server,
    ):
        _image(server, way, setup.size_px, WARM_UP_STEPS, SEED - 1)
        before = server.status() if is_ours else {}
        history = _image(server, way, setup.size_px, setup.num_steps, SEED)
        step_s, latent = seconds_per_step(history), read_latent(latent_file(history, base_dir))
        if not is_ours:
            return Turn(step_s, latent)
        after = server.status()
        num_parallel, sent = (
            after["totals"][name] - before["totals"][name]
            for name in ("steps_parallel", "bytes_between_ranks")
        )
        if num_parallel != setup.num_steps:
            reasons = counted(after["fell_back"])
            raise RigError(f"{num_parallel} of {setup.num_steps} steps were parallel: {reasons}")
        inside_s = max(rank["step_s"] for rank in after["ranks"])
        return Turn(
            step_s,
            latent,
            outside_ms=1000 * (after["last_step_s"] - inside_s),
            inside_ms=1000 * inside_s,
            rank_bytes=sent / setup.num_steps / setup.num_ranks,
        )


def _image(server: Server, way: Way, size_px: int, num_steps: int, seed: int) -> dict[str, Any]:
    prompt = graph(size_px=size_px, num_steps=num_steps, seed=seed)
    if way.has_cfg:
        prompt["negative"] = {**prompt["text"], "inputs": {**prompt["text"]["inputs"], "seed": 4}}
        prompt["sampler"]["inputs"] |= {"cfg": CFG, "negative": ["negative", 0]}
    return server.run(prompt, DEADLINE_S)
