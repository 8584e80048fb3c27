"""Measure the machine: this rank's speed among the others, rank 0's alone, the links between them.

Runs in: worker process, on the host's request.
"""

from __future__ import annotations

import logging
import time

import torch

from comfy_xdit_patch.wire.messages.replies import NotProbed, Probed
from comfy_xdit_patch.wire.messages.requests import Probe
from comfy_xdit_patch.worker.probe.links import LinkProbe
from comfy_xdit_patch.worker.probe.rank import calibrate
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import Groups

log = logging.getLogger(__name__)

PARTS = {"together": 0.35, "alone": 0.25, "links": 0.4}
"""Of the time."""


def probe(message: Probe, groups: Groups) -> Probed | NotProbed:
    """Measure, or say why not.

    What may fail on one rank, for want of memory, is done before the ranks wait for each other;
    they then agree whether to go on.

    Collective: every rank gets the same message.
    """
    try:
        return _probe(message, groups)
    finally:
        if groups.device.type == "cuda":
            torch.cuda.empty_cache()  # Half a GiB, which ComfyUI or a model may want.


def _probe(message: Probe, groups: Groups) -> Probed | NotProbed:
    begin = time.perf_counter()
    together: dict[str, float] = {}
    alone: dict[str, float] = {}
    links: LinkProbe | None = None
    error = ""
    _meet(groups, 0.0)  # Ranks that share something measure at the same time.
    try:
        links = LinkProbe(groups)
        together = calibrate(groups.device, message.budget_s * PARTS["together"])
    except RuntimeError as caught:  # of torch, or of CUDA
        error = f"{type(caught).__name__}: {caught}"
    if _meet(groups, float(links is None or bool(error))):
        return NotProbed(message.request, error or "another rank could not")
    if groups.rank == 0:
        try:
            alone = calibrate(groups.device, message.budget_s * PARTS["alone"])
        except RuntimeError as caught:
            error = f"{type(caught).__name__}: {caught}"
    if _meet(groups, float(bool(error))):
        return NotProbed(message.request, error or "another rank could not")
    assert links is not None
    exchanges = links.times(message.budget_s * PARTS["links"])
    seconds = time.perf_counter() - begin
    log.info("measured in %.2f s", seconds)
    return Probed(message.request, together, alone, exchanges, seconds)


def _meet(groups: Groups, value: float) -> float:
    """Wait for all ranks; return the largest of their values."""
    largest = torch.tensor([value], dtype=torch.float32, device=groups.device)
    collectives.all_reduce_max(largest)
    return float(largest.item())
