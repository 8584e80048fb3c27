"""Which GPUs a machine has, what lies between each two of them, and which CPU's memory each is at.

Runs in: host, and the command line's process. Pure: texts and numbers in, data out; ``survey.py``
asks the system. None stands for what is not known.

What lies between two GPUs is told in the words of ``nvidia-smi topo -m``:

    NV4     4 NVLinks
    PIX     one PCIe switch             PXB   several of them
    PHB     the CPU's PCIe host bridge  NODE  several of them, of one NUMA node
    SYS     the link between NUMA nodes, which are sockets as a rule

Whether data goes straight from one GPU to the other (peer-to-peer) is another question, which the
driver answers: on GeForce cards of late it does not, whatever lies between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PCI_ID = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})(?:\.([0-7]))?")
PATHS = {
    "PIX": "PCIe switch",
    "PXB": "PCIe switches",
    "PHB": "host bridge",
    "NODE": "host bridges",
    "SYS": "other socket",
}

Pair = tuple[str, str]
"""UUIDs of two GPUs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one GPU is. ``uuid`` is None for a CPU rank."""

    name: str
    uuid: str | None
    pci_id: str | None = None
    numa_node: int | None = None


@dataclass(frozen=True, slots=True)
class Interconnect:
    """Places in rank order; ``words[a][b]`` and ``peers[a][b]`` between two of them.

    ``unknown`` says in words what could not be found out.
    """

    places: tuple[Place, ...]
    words: tuple[tuple[str | None, ...], ...]
    peers: tuple[tuple[bool | None, ...], ...]
    unknown: tuple[str, ...] = ()

    def path(self, a: int, b: int) -> str:
        """What lies between two GPUs, for people."""
        word = self.words[a][b]
        if word is None:
            return "unknown"
        if word.startswith("NV"):
            return f"{word[2:]} NVLinks"
        if word == "SYS" and self._is_one_node(a, b):
            return "host bridges"  # Virtual machines say so of all.
        return PATHS.get(word, word)

    def _is_one_node(self, a: int, b: int) -> bool:
        node = self.places[a].numa_node
        return node is not None and node == self.places[b].numa_node


def interconnect_of(
    places: Sequence[Place],
    *,
    words: Mapping[Pair, str],
    peers: Mapping[Pair, bool],
    unknown: Sequence[str] = (),
) -> Interconnect:
    """Put what is known of pairs in the order of ranks."""

    def rows(known: Mapping[Pair, object]) -> tuple[tuple[object | None, ...], ...]:
        return tuple(
            tuple(known.get((a.uuid, b.uuid)) if a.uuid and b.uuid else None for b in places)
            for a in places
        )

    return Interconnect(
        places=tuple(places),
        words=rows(words),  # type: ignore[arg-type]
        peers=rows(peers),  # type: ignore[arg-type]
        unknown=tuple(unknown),
    )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A table of ``nvidia-smi topo``, by its own numbers: a word for each pair, NUMA nodes."""

    words: dict[tuple[int, int], str]
    numa_nodes: dict[int, int]


def parse_matrix(text: str) -> Matrix:
    """Read what ``nvidia-smi topo -m``, or ``topo -p2p r``, prints.

    Network cards, affinities and legend are passed over. What is no such table is an empty one.
    """
    words: dict[tuple[int, int], str] = {}
    nodes: dict[int, int] = {}
    columns: list[str] = []
    has_nodes = False
    for line in _ANSI.sub("", text).splitlines():
        items = line.split()
        if not columns:
            head, _, rest = line.partition("CPU Affinity")
            if items and re.fullmatch(r"GPU\d{1,2}", items[0]):
                columns, has_nodes = head.split(), "NUMA Affinity" in rest
            continue
        row = _number(items[0]) if items else None
        if row is None:
            continue
        for name, word in zip(columns, items[1:], strict=False):
            column = _number(name)
            if column is not None and column != row:
                words[row, column] = word
        beside = items[1 + len(columns) :]  # the CPUs that are near, then the node
        if has_nodes and len(beside) > 1 and re.fullmatch(r"\d{1,3}", beside[1]):
            nodes[row] = int(beside[1])
    return Matrix(words, nodes)


def parse_gpus(text: str) -> dict[int, tuple[str, str | None]]:
    """Read ``nvidia-smi --query-gpu=index,uuid,pci.bus_id --format=csv,noheader``.

    Returns:
        UUID and PCI id by nvidia-smi's number.
    """
    found = {}
    for line in text.splitlines():
        items = [item.strip() for item in line.split(",")]
        if len(items) == 3 and re.fullmatch(r"\d{1,2}", items[0]) and items[1].startswith("GPU-"):
            found[int(items[0])] = items[1], parse_pci_id(items[2])
    return found


def parse_pci_id(text: str) -> str | None:
    """Turn ``00000000:C1:00.0`` into ``0000:c1:00.0``, as the kernel names it."""
    match = _PCI_ID.fullmatch(text.strip().lower())
    if match is None:
        return None
    domain, bus, device, function = match.groups()
    return f"{int(domain, 16):04x}:{bus}:{device}.{function or 0}"


def parse_numa_node(text: str) -> int | None:
    """Read the kernel's ``numa_node``; -1 is a machine that says nothing about it."""
    text = text.strip()
    return int(text) if re.fullmatch(r"\d{1,4}", text) else None


def _number(name: str) -> int | None:
    match = re.fullmatch(r"GPU(\d{1,2})", name)
    return int(match[1]) if match else None
