"""The doctor's sections: memory and its arithmetic, the machine, what keeps GPUs from sharing.

Runs in: the doctor's process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from comfy_xdit_patch.errors import PlanError, Refusal
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.hardware.interconnect import Interconnect
from comfy_xdit_patch.hardware.survey import compute_modes
from comfy_xdit_patch.planning.cost.known_models import FLUX1_DEV
from comfy_xdit_patch.planning.cost.model_shape import PRECISIONS, workload_for
from comfy_xdit_patch.planning.planner import named_plan
from comfy_xdit_patch.planning.residency import Card, gib, plan_residency, token_load
from comfy_xdit_patch.planning.strategy import AUTO, FREE, Strategy

DTYPES = ("bf16", "fp8")
WORLD_SIZES = (2, 4, 8)
AS_A_SEQUENCE = Strategy("ulysses")
"""Weights lie alike whichever way a free strategy shares rows and tokens."""
EXAMPLE = workload_for(FLUX1_DEV, width_px=1024, height_px=1024)


YES_NO = {True: "peer-to-peer", False: "no peer-to-peer", None: "peer-to-peer unknown"}
SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_BYTES = 1 << 30
"""What NVIDIA's guide to NCCL in containers asks for (``--shm-size=1g``)."""
ONE_PROCESS = ("Exclusive_Process", "Exclusive_Thread", "Prohibited")


def memory_lines(
    devices: Sequence[Device], budget_bytes: int | None, strategy: Strategy = AUTO
) -> list[str]:
    """Say the plans for FLUX.1-dev within the budget in force.

    Args:
        devices: one for each rank; empty where the settings give none.
        budget_bytes: ``XDIT_GPU_MEMORY``, or None for what the cards have.
        strategy: one that fits the devices. Other numbers of cards that it does not fit are left
            out.
    """
    if budget_bytes is not None:
        world_sizes = sorted({*WORLD_SIZES, len(devices)} - {0})
        pools = [_cards([budget_bytes] * world_size) for world_size in world_sizes]
        lines = [f"budget: {gib(budget_bytes)} GiB on each card (XDIT_GPU_MEMORY)"]
    else:
        known = [device.memory_bytes for device in devices]
        sizes = [size for size in known if size is not None]
        if not devices or len(sizes) < len(known):
            return ["no budget: this process sees no memory of a GPU. Set XDIT_GPU_MEMORY to plan."]
        pools = [_cards(sizes)]
        lines = [f"budget: what the cards have, {', '.join(gib(size) for size in sizes)} GiB"]
    for cards in pools:
        try:
            plan = named_plan(AS_A_SEQUENCE if strategy.name in FREE else strategy, len(cards))
        except PlanError:
            continue
        load = token_load(
            plan, EXAMPLE, num_blocks=FLUX1_DEV.num_blocks, hidden_size=FLUX1_DEV.width
        )
        for dtype in DTYPES:
            model = FLUX1_DEV.sizes(PRECISIONS[dtype])
            lines.append(
                f"FLUX.1-dev {dtype} ({gib(model.total_bytes)} GiB), 1024 x 1024 px, "
                f"{len(cards)} cards:"
            )
            found = plan_residency(
                plan,
                model,
                load,
                num_blocks=FLUX1_DEV.num_blocks,
                cards=cards,
                first=strategy.first_mode,
            )
            text = [f"refused: {found.reason}"] if isinstance(found, Refusal) else found.lines()
            lines += [f"  {line}" for line in text]
    return lines


def _cards(sizes: list[int]) -> tuple[Card, ...]:
    """One card for each rank; ComfyUI's own process computes on the first."""
    return tuple(Card(size, size, has_host=rank == 0) for rank, size in enumerate(sizes))


def place_lines(found: Interconnect) -> list[str]:
    """Say where each rank's GPU is, and what lies between each two of them."""
    lines = [
        f"rank {rank}: PCI {place.pci_id or 'unknown'}, NUMA node "
        f"{'unknown' if place.numa_node is None else place.numa_node}"
        for rank, place in enumerate(found.places)
    ]
    num_ranks = len(found.places)
    links: dict[str, list[str]] = {}
    for a in range(num_ranks):
        for b in range(a + 1, num_ranks):
            text = f"{found.path(a, b)}, {YES_NO[found.peers[a][b]]}"
            links.setdefault(text, []).append(f"{a}-{b}")
    lines += [f"link {text}: ranks {', '.join(pairs)}" for text, pairs in links.items()]
    return [*lines, *(f"not found out: {text}" for text in found.unknown)]


def gpu_faults(devices: Sequence[Device], found: Interconnect) -> list[str]:
    """Say all that is wrong, asking the system."""
    small = shared_memory_fault(found)
    return [*mode_faults(devices, compute_modes()), *([] if small is None else [small])]


def mode_faults(devices: Sequence[Device], modes: Mapping[str, str]) -> list[str]:
    """Name the GPUs on which the driver lets no second process compute.

    Args:
        modes: compute mode by UUID, as ``nvidia-smi`` has it.
    """
    return [
        f"rank {rank}: compute mode {modes[device.uuid]} lets one process at most use the GPU, and "
        f"ComfyUI and a worker share it. Run `sudo nvidia-smi -i {device.uuid} -c DEFAULT`."
        for rank, device in enumerate(devices)
        if device.uuid is not None and modes.get(device.uuid) in ONE_PROCESS
    ]


def shared_memory_fault(found: Interconnect) -> str | None:
    """Say that /dev/shm is small where data between GPUs passes it: no peer-to-peer."""
    if not any(is_peer is False for row in found.peers for is_peer in row):
        return None
    system = os.statvfs(SHARED_MEMORY)
    num_bytes = system.f_frsize * system.f_blocks
    if num_bytes >= SHARED_MEMORY_BYTES:
        return None
    return (
        f"{SHARED_MEMORY} has {num_bytes >> 20} MiB, and data between GPUs without peer-to-peer "
        "passes it. Give the container more, such as `docker run --shm-size=1g`."
    )
