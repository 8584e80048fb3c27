"""Lines about the machine: where GPUs are, what lies between them, what the workers measured.

Runs in: the doctor's process.
"""

from __future__ import annotations

from typing import Any

from comfy_xdit_patch.planning.interconnect import Interconnect

YES_NO = {True: "peer-to-peer", False: "no peer-to-peer", None: "peer-to-peer unknown"}


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


def measured_lines(machine: Any) -> list[str]:
    """Say what a running ComfyUI measured, from ``machine`` of its status object."""
    if not isinstance(machine, dict):
        return []
    lines = []
    if machine.get("peer_to_peer_disabled"):
        first = str(machine["peer_to_peer_disabled"]).splitlines()[0]
        lines.append(f"peer-to-peer is switched off, because with it: {first}")
    if machine.get("not_measured"):
        lines.append(f"the machine is not measured: {machine['not_measured']}")
    if not machine.get("ranks"):
        return lines
    lines.append(f"machine measured in {machine['measured_in_s']:.1f} s:")
    named = [(f"rank {rank}", gpu) for rank, gpu in enumerate(machine["ranks"])]
    if machine.get("rank_0_alone"):
        named.append(("rank 0 alone", machine["rank_0_alone"]))
    for name, gpu in named:
        lines.append(
            f"  {name}: linears {gpu['linear_tflops']:.3g} TFLOP/s, attention "
            f"{gpu['attention_tflops']:.3g} TFLOP/s, memory {gpu['memory_gb_per_s']:.3g} GB/s, "
            f"from CPU memory {gpu['from_host_gb_per_s']:.3g} GB/s"
        )
    for link in machine.get("links", ()):
        a, b = link["ranks"]
        lines.append(
            f"  ranks {a}-{b} ({link['kind']}): all-to-all {link['all_to_all_gb_per_s']:.3g} GB/s, "
            f"ring {link['ring_gb_per_s']:.3g} GB/s, latency {link['latency_us']:.0f} us"
        )
    return lines
