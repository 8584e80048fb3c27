"""A machine as numbers: its GPUs, the links between them, how fast its CPU launches work.

Runs in: the command line's process. No torch: a machine that is there and one that nobody has are
the same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, permutations
from math import log2
from typing import Literal

from comfy_xdit_patch.errors import PlanError

HOST_CALL_S = 11.2e-6
"""One call of an ATen operator from Python. Measured: 42.3 ms for the 3790 calls of one forward of
FLUX.1 at width 128, on a vCPU at 2.6 GHz, the tiny kernels included: an upper bound."""

SOCKET_BYTES_PER_S = 12e9
"""What all PCIe peer-to-peer traffic from one CPU socket to another shares, each way. Fitted to one
published fact: 8 L40 on two sockets lose to 4 at 1024 px (xDiT, FLUX.1-schnell) and win at 2048."""

# Bandwidth of each card when this many use the same PCIe complex at once, relative to two: fitted
# to L20 at 2 and 4 (cache-dit), extrapolated for 8.
PCIE_CONTENTION = ((2, 1.0), (4, 0.8), (8, 0.55))

RING_STEP_S = 30e-6
"""Launches and waits of one ring step beside its bytes. Fitted to ring on 4 H100."""

LinkKind = Literal["nvlink", "pcie", "host"]
LINK_KINDS: tuple[LinkKind, ...] = ("nvlink", "pcie", "host")
LINK_NAMES = {
    "nvlink": "NVLink",
    "pcie": "PCIe peer-to-peer",
    "host": "through CPU memory (no peer-to-peer)",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Rates are sustained, in large matrices; ``fp8_flops`` 0: none known."""

    name: str
    memory_bytes: int
    """What planning may use of it."""
    linear_flops: float
    attention_flops: float
    fp8_flops: float
    memory_bytes_per_s: float
    host_bytes_per_s: float
    """From CPU memory."""
    socket: int = 0
    """NUMA node."""


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between two GPUs: what each sends a second, by the form of the collective.

    ``ring_bytes_per_s`` is for all-gather, all-reduce and sends from one to the next.
    ``latency_s`` is one collective's time beside its bytes.
    """

    kind: LinkKind
    all_to_all_bytes_per_s: float
    ring_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs in rank order, and ``links[a][b]`` between two of them; ``links[a][a]`` is not read.

    The links' rates are those of two GPUs; what sockets and crowds leave of them is estimated.
    """

    gpus: tuple[Gpu, ...]
    links: tuple[tuple[Link, ...], ...]
    host_call_s: float = HOST_CALL_S

    def __post_init__(self) -> None:
        num_gpus = len(self.gpus)
        if not num_gpus or [len(row) for row in self.links] != [num_gpus] * num_gpus:
            raise PlanError(
                f"A machine of {num_gpus} GPUs and links for "
                f"{'x'.join(str(len(row)) for row in self.links) or 'none'}."
            )

    def first(self, num_gpus: int) -> Machine:
        """Keep the fastest GPUs; among equals those of the first socket, in their order."""
        if num_gpus == len(self.gpus) > 1:
            return self
        order = sorted(
            range(len(self.gpus)),
            key=lambda i: (-self.gpus[i].linear_flops, self.gpus[i].socket, i),
        )
        kept = sorted(order[:num_gpus], key=lambda i: (self.gpus[i].socket, i))
        links = tuple(tuple(self.links[a][b] for b in kept) for a in kept)
        return replace(self, gpus=tuple(self.gpus[i] for i in kept), links=links)

    def latency_s(self, groups: Sequence[Sequence[int]]) -> float:
        """What one collective takes beside its bytes."""
        return max(
            self.links[a][b].latency_s for group in groups for a, b in combinations(group, 2)
        )

    def all_to_all_s(self, groups: Sequence[Sequence[int]], num_bytes: float) -> float:
        """Seconds in which every rank has sent ``num_bytes``, in equal parts to its group's."""
        pairs = [pair for group in groups for pair in permutations(group, 2)]
        rate = min(
            self.links[a][b].all_to_all_bytes_per_s * self._left(self.links[a][b].kind)
            for a, b in pairs
        )
        part = num_bytes / (len(groups[0]) - 1)
        return max(num_bytes / rate, self._between_sockets_s(pairs, part))

    def ring_s(self, groups: Sequence[Sequence[int]], num_bytes: float) -> float:
        """Seconds in which every rank has sent ``num_bytes`` to the next one of its group."""
        pairs = [pair for group in groups for pair in pairwise([*group, group[0]])]
        rate = min(
            self.links[a][b].ring_bytes_per_s * self._left(self.links[a][b].kind) for a, b in pairs
        )
        return max(num_bytes / rate, self._between_sockets_s(pairs, num_bytes))

    def from_host_s(self, num_bytes: float) -> float:
        """Seconds in which every GPU has read ``num_bytes`` from CPU memory."""
        slowest = min(gpu.host_bytes_per_s for gpu in self.gpus)
        return num_bytes / (slowest * pcie_contention(len(self.gpus)))

    def _left(self, kind: LinkKind) -> float:
        """What is left of a link's rate when all GPUs send."""
        return 1.0 if kind == "nvlink" else pcie_contention(len(self.gpus))

    def _between_sockets_s(self, pairs: Sequence[tuple[int, int]], num_bytes: float) -> float:
        """Seconds of ``num_bytes`` for each pair, over what peer-to-peer has between sockets."""
        num_crossing = sum(
            self.gpus[a].socket != self.gpus[b].socket and self.links[a][b].kind == "pcie"
            for a, b in pairs
        )
        return num_bytes * num_crossing / 2 / SOCKET_BYTES_PER_S  # half of them each way


def pcie_contention(num_gpus: int) -> float:
    """PCIE_CONTENTION for any number: linear in its logarithm, constant beyond its ends."""
    first, last = PCIE_CONTENTION[0], PCIE_CONTENTION[-1]
    if num_gpus <= first[0]:
        return first[1]
    for (below, high), (above, low) in pairwise(PCIE_CONTENTION):
        if num_gpus <= above:
            part = log2(num_gpus / below) / log2(above / below)
            return high + (low - high) * part
    return last[1]
