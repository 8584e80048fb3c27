"""The demo: one unmodified workflow on stock ComfyUI and on several ranks, and the difference.

Runs in: the rig's environment, started by ``python install.py demo``. ComfyUI runs in servers of
its own, one after the other, so that they do not share the machine while they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from rig import graphs
from rig.checkpoints import Sizes, models_directory
from rig.compare import AMPLIFY, Difference, amplified_difference, compare_all, draw_side_by_side
from rig.environment import RigError, cache_root, telling
from rig.outputs import Pixels
from rig.report import Run, failure, run_of, summary_of, table
from rig.server import Server, base_directory
from rig.trees import Tree, obtain_tree, read_tree

DEFAULT_WORKFLOW = "ksampler_dev"
DEFAULT_CPU_RANKS = 2
MIN_HEADS = 8
NATIVE_HIDDEN = 3072
IMAGE_DEADLINE_S = 3600.0
WARM_UP_STEPS = 4
POLL_S = 0.1
OUT = Path("demo")


def main(arguments: list[str]) -> int:
    """Run the demo; 0 only if it showed what it promises."""
    options = _parse(arguments)
    try:
        return _demo(options)
    except RigError as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="install.py demo", description=__doc__)
    parser.add_argument("--workflow", type=Path, help="a graph in ComfyUI's API format")
    parser.add_argument("--ranks", type=int, help="default: 2 on CPU, else every GPU")
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI directory; default: obtained")
    parser.add_argument("--hidden", type=int, help="model width, a multiple of 128 (head width)")
    parser.add_argument("--native", action="store_true", help="FLUX's own width, and no shim")
    parser.add_argument("--keep", action="store_true", help="keep the servers' directories")
    options = parser.parse_args(arguments)
    if options.ranks is not None and options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: at least 1 rank is needed")
    if options.hidden is not None and (
        options.native or options.hidden % 128 or options.hidden < 1
    ):
        parser.error(f"--hidden {options.hidden}: a multiple of 128, and not with --native")
    return options


@dataclass(frozen=True)
class Plan:
    """What both servers have in common."""

    tree: Tree
    device: str
    ranks: int
    workflow: Path
    models: Path
    base: Path
    env: dict[str, str]


def _demo(options: argparse.Namespace) -> int:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = options.ranks or num_gpus or DEFAULT_CPU_RANKS
    device = "gpu" if 0 < ranks <= num_gpus else "cpu"
    hidden = options.hidden or (NATIVE_HIDDEN if options.native else 128 * max(MIN_HEADS, ranks))
    workflow = options.workflow or graphs.workflow_path(DEFAULT_WORKFLOW)
    sha_before = _sha256(workflow)
    graph = graphs.load(workflow)
    OUT.mkdir(exist_ok=True)
    tree = read_tree(options.comfyui) if options.comfyui else obtain_tree()
    with telling("writing the model files"):
        models = models_directory(Sizes(hidden=hidden))
    plan = Plan(
        tree=tree,
        device=device,
        ranks=ranks,
        workflow=workflow,
        models=models,
        base=cache_root() / "demo" / str(os.getpid()),
        env={"RIG_SHIM_DIFFUSION": "0"} if options.native else {},
    )
    print(f"ComfyUI {plan.tree.version}, {workflow.name}, {ranks} {device.upper()} ranks")
    print(f"model: FLUX of width {hidden}, {hidden // 128} heads, random weights")
    # Strict: ``auto`` then takes all ranks unmeasured, and whatever keeps them idle is an error.
    gpus = {"XDIT_GPUS": f"cpu:{ranks}" if device == "cpu" else str(ranks), "XDIT_STRICT": "1"}
    try:
        stock = _serve(plan, "stock", {"XDIT_STRATEGY": "off"}, graph)
        parallel = _serve(plan, "parallel", gpus, graph)
    finally:
        if not options.keep:
            shutil.rmtree(plan.base, ignore_errors=True)
    difference = compare_all(stock.images, parallel.images)
    images = _write_images(stock, parallel, difference)
    shas = (sha_before, _sha256(workflow))
    summary = summary_of(plan.tree, workflow, shas, stock, parallel, difference, images)
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(table(summary, difference))
    if options.keep:
        print(f"kept: {plan.base}")
    reason = failure(summary, difference, ranks)
    if reason:
        print(f"demo: failed: {reason}", file=sys.stderr)
    return 1 if reason else 0


def _serve(plan: Plan, name: str, env: dict[str, str], graph: graphs.Graph) -> Run:
    """Start a server, make a warm-up image with another seed, then the image that counts."""
    with contextlib.ExitStack() as stack:
        base_dir = stack.enter_context(base_directory(plan.base / name, plan.models, keep=True))
        server = Server(
            plan.tree,
            base_dir,
            env=plan.env | env,
            device=plan.device,
            threads=1 if plan.device == "cpu" else None,
            log_path=OUT / f"{name}.log",
            is_cold=True,
        )
        with telling(f"{name:8} ComfyUI is starting"):
            stack.enter_context(server)
        is_parallel = name == "parallel"
        if is_parallel:
            server.status()  # says at once if the patch is not active
        _make(server, graphs.warm_up(graph, WARM_UP_STEPS), f"{name:8} warm-up")
        before = server.status() if is_parallel else {}
        prompt_id, history = _make(server, graph, f"{name:8} image  ")
        after = server.status() if is_parallel else {}
        times = server.step_times(prompt_id)
        if not times:
            raise RigError(f"{plan.workflow} reports no steps; it needs a sampler of 3 steps.")
        return run_of(server.images(history), statistics.median(times), before, after)


def _make(server: Server, graph: graphs.Graph, caption: str) -> tuple[str, dict[str, Any]]:
    """Make one image behind a progress bar."""
    prompt_id = server.post_prompt(graph)
    total = sum(
        node["inputs"]["steps"]
        for node in graph.values()
        if isinstance(node["inputs"].get("steps"), int)
    )
    end = time.monotonic() + IMAGE_DEADLINE_S
    # Its clock goes on while no step is done; then only the whole average (0) is a true rate.
    often = {"mininterval": 0.5, "miniters": 0, "smoothing": 0}
    with tqdm(total=total or None, desc=caption, unit="step", **often) as bar:
        while (history := server.poll(prompt_id)) is None:
            bar.update(server.num_steps_done(prompt_id) - bar.n)
            if time.monotonic() > end:
                raise RigError(f"{caption.strip()}: no image after {IMAGE_DEADLINE_S} s.")
            time.sleep(POLL_S)
        bar.update(server.num_steps_done(prompt_id) - bar.n)
    return prompt_id, history


def _write_images(stock: Run, parallel: Run, difference: Difference) -> dict[str, str]:
    first: tuple[Pixels, Pixels] = stock.images[0], parallel.images[0]
    paths = {name: OUT / f"{name}.png" for name in ("stock", "parallel", "side_by_side")}
    Image.fromarray(first[0]).save(paths["stock"])
    Image.fromarray(first[1]).save(paths["parallel"])
    panels = [
        (f"stock ComfyUI, {stock.seconds_per_step:.3f} s/step", first[0]),
        (f"{parallel.ranks} ranks, {parallel.seconds_per_step:.3f} s/step", first[1]),
        (f"difference x {AMPLIFY} ({difference})", amplified_difference(*first)),
    ]
    draw_side_by_side(panels, paths["side_by_side"])
    return {name: str(path) for name, path in paths.items()}


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RigError(f"--workflow {path}: {os.strerror(error.errno or 0)}.") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
