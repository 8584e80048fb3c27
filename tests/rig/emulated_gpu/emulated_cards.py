"""Which cards this machine pretends to have.

Runs in: every process of a rig server with emulated cards; the rig itself; ``nvidia-smi`` here.

    EMULATED_CARDS=4090:4,4090:4    two cards that answer as RTX 4090s, with 4 GiB each
    EMULATED_CARDS=h100             one H100 with all of its memory
    EMULATED_MODE=Exclusive_Process compute mode of all cards, in nvidia-smi's word
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 1 << 30
EXCLUSIVE = "Exclusive_Process"


@dataclass(frozen=True)
class Kind:
    """What a kind of card answers."""

    name: str
    capability: tuple[int, int]
    gib: float
    has_peers: bool = False
    num_processors: int = 128


KINDS = {
    "3090": Kind("NVIDIA GeForce RTX 3090", (8, 6), 24, num_processors=82),
    "4090": Kind("NVIDIA GeForce RTX 4090", (8, 9), 24),
    "5090": Kind("NVIDIA GeForce RTX 5090", (12, 0), 32, num_processors=170),
    "a100": Kind("NVIDIA A100-SXM4-80GB", (8, 0), 80, has_peers=True, num_processors=108),
    "l40s": Kind("NVIDIA L40S", (8, 9), 48, has_peers=True, num_processors=142),
    "h100": Kind("NVIDIA H100 80GB HBM3", (9, 0), 80, has_peers=True, num_processors=132),
    "mig": Kind("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 40, num_processors=60),
}


@dataclass(frozen=True)
class Card:
    """One card."""

    number: int
    kind: Kind
    total_bytes: int

    @property
    def uuid(self) -> str:
        return f"GPU-00000000-0000-0000-0000-{self.number:012d}"


def cards(environ: Mapping[str, str] = os.environ) -> list[Card]:
    """The cards of the machine, whatever a process sees of them."""
    made = []
    for number, text in enumerate(environ["EMULATED_CARDS"].split(",")):
        name, _, gib = text.partition(":")
        kind = KINDS[name]
        made.append(Card(number, kind, int(float(gib or kind.gib) * GIB)))
    return made


def visible(environ: Mapping[str, str] = os.environ) -> list[Card]:
    """Those that a process sees, in its own order."""
    all_of_them = cards(environ)
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return all_of_them
    by_uuid = {card.uuid: card for card in all_of_them}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    return [by_uuid[name] if name in by_uuid else all_of_them[int(name)] for name in wanted]
