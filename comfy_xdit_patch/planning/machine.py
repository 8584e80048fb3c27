"""A machine as numbers: its GPUs, the links between them, how fast its CPU launches work.

Runs in: host, worker and the command line's process. No torch: a machine that was measured and one
that nobody has are the same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
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
    """What lies between two GPUs.

    ``bytes_per_s`` is what each GPU sends in a collective of two, ``latency_s`` one collective's
    time beside its bytes.
    """

    kind: LinkKind
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs in rank order, and ``links[a][b]`` between two of them; ``links[a][a]`` is not read."""

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
        order = sorted(
            range(len(self.gpus)),
            key=lambda i: (-self.gpus[i].linear_flops, self.gpus[i].socket, i),
        )
        kept = sorted(order[:num_gpus], key=lambda i: (self.gpus[i].socket, i))
        links = tuple(tuple(self.links[a][b] for b in kept) for a in kept)
        return replace(self, gpus=tuple(self.gpus[i] for i in kept), links=links)

    def slowest_link(self, groups: Sequence[Sequence[int]]) -> Link:
        """The link on which collectives that run at once in these groups wait."""
        links = [self.links[a][b] for group in groups for a, b in combinations(group, 2)]
        return min(links, key=lambda link: (link.bytes_per_s, -link.latency_s))

    def all_to_all_s(self, groups: Sequence[Sequence[int]], num_bytes: float) -> float:
        """Seconds in which every rank has sent ``num_bytes``, in equal parts to its group's."""
        crossing = sum(
            num_bytes * sum(self._crosses(rank, other) for other in group) / (len(group) - 1)
            for group in groups
            for rank in group
        )
        return self._transfer_s(groups, num_bytes, crossing)

    def ring_s(self, groups: Sequence[Sequence[int]], num_bytes: float) -> float:
        """Seconds in which every rank has sent ``num_bytes`` to the next one of its group."""
        crossing = sum(
            num_bytes * self._crosses(rank, group[(index + 1) % len(group)])
            for group in groups
            for index, rank in enumerate(group)
        )
        return self._transfer_s(groups, num_bytes, crossing)

    def contention(self, kind: LinkKind) -> float:
        """What is left of a link's bandwidth when all GPUs send."""
        return 1.0 if kind == "nvlink" else _interpolated(len(self.gpus))

    def _transfer_s(
        self, groups: Sequence[Sequence[int]], num_bytes: float, crossing: float
    ) -> float:
        link = self.slowest_link(groups)
        # Half of what crosses goes each way.
        between_sockets_s = crossing / 2 / SOCKET_BYTES_PER_S
        return max(num_bytes / (link.bytes_per_s * self.contention(link.kind)), between_sockets_s)

    def _crosses(self, a: int, b: int) -> bool:
        """Whether peer-to-peer traffic goes from one CPU socket to another."""
        return self.gpus[a].socket != self.gpus[b].socket and self.links[a][b].kind == "pcie"


def _interpolated(num_gpus: int) -> float:
    """PCIE_CONTENTION for any number, linear in its logarithm, constant beyond its ends."""
    first, last = PCIE_CONTENTION[0], PCIE_CONTENTION[-1]
    if num_gpus <= first[0]:
        return first[1]
    for (below, high), (above, low) in pairwise(PCIE_CONTENTION):
        if num_gpus <= above:
            part = log2(num_gpus / below) / log2(above / below)
            return high + (low - high) * part
    return last[1]
