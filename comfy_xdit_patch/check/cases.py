"""The ways in which the same image is made, and what one of them tells.

Runs in: the check's process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comfy_xdit_patch.check.cards import MemoryWatch, used_bytes
from comfy_xdit_patch.check.comparison import Difference
from comfy_xdit_patch.check.graph import (
    MEASURED_SEED,
    MODEL_NAME,
    WARM_UP_SEED,
    graph,
    latent_file,
    seconds_per_step,
)
from comfy_xdit_patch.check.server import TAIL_LINES, ComfyServer, knows
from comfy_xdit_patch.errors import CheckError

IMAGE_DEADLINE_S = 600.0
SOONER = {"XDIT_STEP_TIMEOUT": "240"}
"""So that the workers say which rank hangs before the check gives up."""
FREE_TIMES = 3
FREE_PAUSE_S = 1.0
"""ComfyUI misses a Free that comes while it collects garbage after a prompt: it is asked again."""
NO_DYNAMIC_VRAM = "--disable-dynamic-vram"
KEPT = ("xDiT:", "DynamicVRAM", "attention")
"""Lines of ComfyUI's log with one of these are kept: what it runs with, and what we say."""

STOCK = "stock"
SPLIT = "stock, split attention"
OURS = "ours"
STATIC = "ours, no dynamic VRAM"


@dataclass(frozen=True, slots=True)
class Case:
    """One ComfyUI: further options of its command line, and its XDIT_* variables."""

    name: str
    options: tuple[str, ...]
    variables: dict[str, str]
    is_ours: bool


@dataclass(frozen=True, slots=True)
class CardMemory:
    """Bytes used of one card by all processes: before the case, at most, and after Free."""

    uuid: str
    before_bytes: int | None
    most_bytes: int | None
    after_free_bytes: int | None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What a case told. Where it did not get that far, fields are as they are here.

    Attributes:
        error: why it ended early.
        seconds_per_step: from the first step of the measured image to its last.
        run: the status object's report of the measured image (``last_run``); None of stock.
        forwards: how many calls each rank computed in the measured image.
        fall_back_reasons: the reasons of all images of this case.
        outside_s: what the last step took in the host beside its slowest rank.
        launch_bound: whether each rank's CPU set the pace of the last step.
        residency: the plan's lines about memory.
        difference: from stock's latent.
        log: lines of ComfyUI's log that are kept; after an error, its last lines too.
    """

    name: str
    is_ours: bool
    error: str | None = None
    seconds: float = 0.0
    seconds_per_step: float | None = None
    run: dict[str, Any] | None = None
    forwards: tuple[int, ...] = ()
    fall_back_reasons: dict[str, int] | None = None
    outside_s: float | None = None
    launch_bound: tuple[bool | None, ...] = ()
    residency: tuple[str, ...] = ()
    memory: tuple[CardMemory, ...] = ()
    latent: Path | None = None
    difference: Difference | None = None
    log: tuple[str, ...] = ()


def cases_for(tree: Path, num_gpus: int) -> list[Case]:
    """Name the cases that a ComfyUI can run."""
    off = {"XDIT_STRATEGY": "off"}
    # ``all`` leaves a single GPU to ComfyUI alone; by number it gets one rank.
    ours = {"XDIT_STRICT": "1", "XDIT_GPUS": "all" if num_gpus > 1 else "1", **SOONER}
    cases = [
        Case(STOCK, (), off, is_ours=False),
        # With xformers installed, ComfyUI would not look at the other option.
        Case(SPLIT, ("--disable-xformers", "--use-split-cross-attention"), off, is_ours=False),
        Case(OURS, (), ours, is_ours=True),
    ]
    if knows(tree, NO_DYNAMIC_VRAM):
        cases.append(Case(STATIC, (NO_DYNAMIC_VRAM,), ours, is_ours=True))
    return cases


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases have in common."""

    tree: Path
    folder: Path
    """Temporary; it holds the model file, and a base directory for each case."""
    size_px: int
    num_steps: int
    uuids: tuple[str, ...]
    """Of the cards, in the order of ranks."""

    def run(self, case: Case, *, say: Callable[[str], None]) -> CaseResult:
        """Make a warm-up image and a measured one; what goes wrong is in the result."""
        base_dir = self.folder / case.name.replace(", ", "-").replace(" ", "-")
        models = base_dir / "models" / "diffusion_models"
        models.mkdir(parents=True)
        (models / MODEL_NAME).symlink_to(self.folder / MODEL_NAME)
        server = ComfyServer(self.tree, base_dir, case.options, case.variables)
        result = CaseResult(case.name, case.is_ours)
        started = time.monotonic()
        before, after = used_bytes(), dict[str, int]()
        watch = MemoryWatch()
        try:
            say("ComfyUI starts")
            with server:
                with watch:
                    result = self._measure(server, result, base_dir, say)
                after = _free(server)
        except CheckError as error:
            result = replace(result, error=result.error or str(error))
        lines = server.log_lines()
        log = [line for line in lines if any(text in line for text in KEPT)]
        log += lines[-TAIL_LINES:] if result.error else ()
        memory = [
            CardMemory(uuid, before.get(uuid), watch.most.get(uuid), after.get(uuid))
            for uuid in self.uuids
        ]
        seconds = time.monotonic() - started
        return replace(result, memory=tuple(memory), log=tuple(log), seconds=seconds)

    def _measure(
        self, server: ComfyServer, result: CaseResult, base_dir: Path, say: Callable[[str], None]
    ) -> CaseResult:
        earlier: dict[str, Any] = {}
        try:
            for seed, what in ((WARM_UP_SEED, "warm-up image"), (MEASURED_SEED, "measured image")):
                say(what)
                earlier = _status(server) if result.is_ours else {}
                prompt = graph(size_px=self.size_px, num_steps=self.num_steps, seed=seed)
                history = server.run(prompt, deadline_s=IMAGE_DEADLINE_S)
        except CheckError as error:
            result = replace(result, error=str(error))
        else:
            result = replace(
                result,
                seconds_per_step=seconds_per_step(history),
                latent=latent_file(history, base_dir),
            )
        return with_status(result, earlier, _status(server)) if result.is_ours else result


def with_status(result: CaseResult, earlier: dict[str, Any], status: dict[str, Any]) -> CaseResult:
    """Add what ``/xdit/status`` says after the measured image; ``earlier`` is from before it."""
    before = {rank["rank"]: rank["forwards"] for rank in earlier["ranks"]}
    ranks = status["ranks"]
    host_s = status["last_step_s"]
    of_ranks = [rank["step_s"] for rank in ranks if rank["step_s"] is not None]
    return replace(
        result,
        run=status["last_run"],
        forwards=tuple(rank["forwards"] - before.get(rank["rank"], 0) for rank in ranks),
        fall_back_reasons={each["reason"]: each["count"] for each in status["fell_back"]},
        outside_s=host_s - max(of_ranks) if host_s is not None and of_ranks else None,
        launch_bound=tuple(rank["is_launch_bound"] for rank in ranks),
        residency=tuple(status["residency"]),
    )


def _status(server: ComfyServer) -> dict[str, Any]:
    try:
        status = server.request("/xdit/status")
    except CheckError as error:
        raise CheckError(
            f"comfy-xdit-patch is not active in this ComfyUI: {error}. Run install.py."
        ) from error
    if not status["ranks"]:
        raise CheckError(f"comfy-xdit-patch is not active in this ComfyUI: {status['reason']}.")
    return status


def _free(server: ComfyServer) -> dict[str, int]:
    """Unload models as ComfyUI's menu does; return what is used of each card then."""
    for _ in range(FREE_TIMES):
        server.request("/free", {"unload_models": True, "free_memory": True})
        time.sleep(FREE_PAUSE_S)
    return used_bytes()
