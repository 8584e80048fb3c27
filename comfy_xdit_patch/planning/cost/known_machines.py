"""Cards and links by name, and machines made of them: for planning without the hardware.

Runs in: the command line's process.

Rates are what FLUX sustains, not what a data sheet says. ``source`` tells where a card's come from:
``fitted`` to a published time on one GPU (docs/planning.md has the rows), or ``assumed``, near what
its fitted neighbours reach of their peak; fp8 without a published time is twice bf16.
Memory bandwidth and size are the makers'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from comfy_xdit_patch.errors import SettingsError
from comfy_xdit_patch.planning.cost.machine import LINK_KINDS, Gpu, Link, LinkKind, Machine
from comfy_xdit_patch.planning.residency import MIB

TERA = 1e12
GIGA = 1e9

MAX_GPUS = 16
"""One machine; and the number of plans grows with the divisors of every number up to this."""

# PCIe 4.0 x16, each GPU in a collective of two. Fitted to L20 (cache-dit); through CPU memory it is
# NCCL's shared-memory transport, assumed.
PCIE_BYTES_PER_S = 22e9
THROUGH_HOST_BYTES_PER_S = 12e9
# Pinned memory to the card, PCIe 4.0 x16: about 80 % of 31.5 GB/s. Assumed.
FROM_HOST_BYTES_PER_S = 25e9

LATENCIES_S: dict[LinkKind, float] = {"nvlink": 10e-6, "pcie": 20e-6, "host": 40e-6}
"""One small NCCL collective. Assumed, from the commonly measured 10 to 60 us."""


@dataclass(frozen=True, slots=True)
class Card:
    """One product. Rates in TFLOP/s, bandwidths in GB/s; ``pcie`` is relative to PCIe 4.0 x16."""

    name: str
    memory_mib: int
    linear: float
    fp8: float
    memory: float
    link: LinkKind
    source: Literal["fitted", "assumed"]
    nvlink: float | None = None
    pcie: float = 1.0
    attention: float | None = None

    def gpu(self, socket: int) -> Gpu:
        return Gpu(
            name=self.name,
            memory_bytes=self.memory_mib * MIB,
            linear_flops=self.linear * TERA,
            attention_flops=(self.attention or self.linear) * TERA,
            fp8_flops=self.fp8 * TERA,
            memory_bytes_per_s=self.memory * GIGA,
            host_bytes_per_s=FROM_HOST_BYTES_PER_S * self.pcie,
            socket=socket,
        )


CARDS = {
    card.name: card
    for card in (
        Card("h100", 81559, 570, 993, 3350, "nvlink", "fitted", nvlink=200, pcie=2),
        Card("h200", 143771, 600, 1045, 4800, "nvlink", "assumed", nvlink=200, pcie=2),
        Card("a100", 81920, 212, 0, 2039, "nvlink", "fitted", nvlink=120),
        Card("l20", 46068, 104, 208, 864, "pcie", "fitted"),
        Card("l40", 46068, 150, 300, 864, "pcie", "assumed"),
        Card("l40s", 46068, 230, 460, 864, "pcie", "assumed"),
        Card("rtx2000ada", 16380, 43, 86, 224, "pcie", "fitted", pcie=0.5),
        Card("4090", 24564, 155, 325, 1008, "host", "fitted"),
        Card("5090", 32607, 186, 340, 1792, "host", "fitted", pcie=2),
        Card("3090", 24576, 60, 0, 936, "host", "assumed"),
    )
}


def machine_of(gpus: str, *, link: LinkKind | None = None, num_sockets: int = 1) -> Machine:
    """Build a machine from names.

    Args:
        gpus: ``8x4090``, or several kinds: ``1x4090+2x3090``.
        link: between all GPUs; what the cards have if None.
        num_sockets: CPU sockets; the GPUs are shared among them in their order.

    Raises:
        SettingsError: a name or number is not legal.
    """
    cards: list[Card] = []
    for part in gpus.lower().replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d{1,2})x)?(\w+)", part)
        if match is None or match[2] not in CARDS or not 0 < int(match[1] or 1) <= MAX_GPUS:
            raise SettingsError(
                f'--gpus "{gpus}" is not legal. Legal: a count and a card such as 8x4090, several '
                f"joined by +. Cards: {', '.join(sorted(CARDS))}."
            )
        cards += [CARDS[match[2]]] * int(match[1] or 1)
    if not 1 <= num_sockets <= len(cards) <= MAX_GPUS:
        raise SettingsError(
            f"--gpus and --sockets make {len(cards)} GPUs on {num_sockets} sockets. "
            f"Legal: up to {MAX_GPUS} GPUs, and from 1 socket to one for each GPU."
        )
    links = tuple(tuple(_link(a, b, link) for b in cards) for a in cards)
    placed = tuple(card.gpu(i * num_sockets // len(cards)) for i, card in enumerate(cards))
    return Machine(gpus=placed, links=links)


def _link(a: Card, b: Card, asked: LinkKind | None) -> Link:
    """Two cards meet on what both have; the slower one sets the pace."""
    kind = max(a.link, b.link, key=LINK_KINDS.index) if asked is None else asked
    pcie = min(a.pcie, b.pcie)
    if kind == "nvlink":
        if a.nvlink is None or b.nvlink is None:
            name = a.name if a.nvlink is None else b.name
            raise SettingsError(
                f"--link nvlink is not legal: {name} has no NVLink. Legal: pcie, host."
            )
        rate = min(a.nvlink, b.nvlink) * GIGA
    elif kind == "pcie":
        rate = PCIE_BYTES_PER_S * pcie
    else:
        rate = THROUGH_HOST_BYTES_PER_S * pcie
    return Link(kind, rate, rate, LATENCIES_S[kind])
