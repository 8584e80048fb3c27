"""The ranks of ``test_mailboxes.py``: the same exchanges through mailboxes and through gloo.

Runs in: a process of its own that forks the ranks, so that torch is imported once; no ComfyUI.

    python mailbox_ranks.py FOLDER SLOT_BYTES    writes FOLDER/RANK.json

Every rank draws the same exchanges. How many are under way at once, and in which order they are
waited for, each rank draws for itself.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_ranks import met, run_and_exit

from comfy_xdit_patch.worker.ranks import collectives, mailboxes

WORLD_SIZE = 8
GROUPS = (range(2), (1, 3, 4), range(5), (2, 7), range(WORLD_SIZE))
KINDS = ("all_to_all", "all_gather", "pass_on", "swap")
TIMES, AT_ONCE = 4, 4
"""How often each kind is in each group; how many are under way."""
TIMEOUT_S = 60.0
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.float64)
SIZES = (0, 0, 1, 5, 700, 3000)
"""Elements. A mailbox of two slots of 4 KiB is smaller than most of them, in some dtypes."""


class Exchanges:
    """What a rank draws: each returns the tensors that are filled, and the works."""

    def __init__(self, rank: int, common: random.Random) -> None:
        self._rank, self._common = rank, common

    def drawn(self, kind: str, group: Any, ranks: list[int]) -> Callable[[], Any] | None:
        """How to begin an exchange of a group; None on other ranks."""
        sizes = [[self._common.choice(SIZES) for _ in ranks] for _ in ranks]
        dtype, seed = self._common.choice(DTYPES), self._common.random()
        if self._rank not in ranks:
            return None
        own = ranks.index(self._rank)
        received = [row[own] for row in sizes]
        before, after = (own - 1) % len(ranks), (own + 1) % len(ranks)

        def numbers(size: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(int(seed * 2**32) + self._rank)
            return torch.randint(0, 255, (size,), generator=generator).to(dtype)

        def all_to_all() -> Any:
            out = torch.empty(sum(received), dtype=dtype)
            data = numbers(sum(sizes[own]))
            work = collectives.all_to_all_async(
                out, data, received=received, sent=sizes[own], group=group
            )
            return [out], [work]

        def all_gather() -> Any:
            whole = torch.empty(len(ranks) * sizes[0][0], dtype=dtype)
            shard = numbers(sizes[0][0])
            return [whole], [collectives.all_gather_into_async(whole, shard, group=group)]

        def pass_on() -> Any:
            out = torch.empty(sizes[before][0] + 1, dtype=dtype)
            data = numbers(sizes[own][0] + 1)
            works = collectives.pass_on_async(out, data, to=after, source=before, group=group)
            return [out], works

        def swap() -> Any:
            edges = [
                (other, numbers(sizes[own][other] + 1), torch.empty(size + 1, dtype=dtype))
                for other, size in enumerate(received)
                if abs(other - own) == 1
            ]
            return [out for _, _, out in edges], collectives.swap_async(edges, group=group)

        begin: Callable[[], Any] = locals()[kind]
        return begin


def run(rank: int, rooms: mailboxes.Mailboxes) -> dict[str, Any]:
    groups = [dist.new_group(list(ranks)) for ranks in GROUPS]
    expected = []
    for _, begin in drawn(rank, groups):
        outs, works = begin()
        collectives.finish(works)
        expected.append(outs)
    collectives.mailboxes = rooms
    own, kinds, different, most = random.Random(rank), set(), [], 0
    under_way: list[tuple[str, Any, Any, Any]] = []
    for (kind, begin), outs in zip(drawn(rank, groups), expected, strict=True):
        kinds.add(kind)
        under_way.append((kind, outs, *begin()))
        most = max(most, len(under_way))
        while len(under_way) == AT_ONCE or (under_way and own.random() < 0.3):
            different += ended(under_way.pop(own.randrange(len(under_way))))
    while under_way:
        different += ended(under_way.pop())
    return {"kinds": sorted(kinds), "different": different, "most": most}


def drawn(rank: int, groups: list[Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All exchanges of a rank, the same each time: kind, and how to begin it."""
    common = random.Random(1)
    exchanges = Exchanges(rank, common)
    order = [*product(KINDS, range(len(GROUPS)))] * TIMES
    common.shuffle(order)
    for kind, index in order:
        begin = exchanges.drawn(kind, groups[index], list(GROUPS[index]))
        if begin is not None:
            yield f"{kind} of {len(GROUPS[index])}", begin


def ended(exchange: tuple[str, Any, Any, Any]) -> list[str]:
    name, expected, found, works = exchange
    collectives.finish(works)
    return [name] * any(not a.equal(b) for a, b in zip(expected, found, strict=True))


def main(rank: int, folder: Path, fd: int) -> None:
    rooms = mailboxes.Mailboxes(fd, rank=rank, world_size=WORLD_SIZE, timeout_s=TIMEOUT_S)
    with met(rank, WORLD_SIZE, folder, datetime.timedelta(seconds=TIMEOUT_S)):
        found = run(rank, rooms)
        (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)  # before anything computes: threads do not survive a fork
    mailboxes.SLOT_BYTES = int(sys.argv[2])
    mailboxes.MEMORY_BYTES = 0
    run_and_exit(main, WORLD_SIZE, Path(sys.argv[1]), os.memfd_create("mailboxes"))
