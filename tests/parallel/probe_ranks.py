"""Ranks that make their first exchange and measure the machine, without ComfyUI or a host.

Runs in: a process of its own; the ranks are forked from it, for importing is what takes time.

    probe_ranks.py FOLDER WORLD_SIZE...
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from comfy_xdit_patch.errors import ExchangeError
from comfy_xdit_patch.wire.messages.codec import encode
from comfy_xdit_patch.wire.messages.requests import Probe
from comfy_xdit_patch.worker.probe.probe import probe
from comfy_xdit_patch.worker.ranks import collectives, first_exchange
from comfy_xdit_patch.worker.ranks.groups import Groups

BUDGET_S = 1.0
DELAY_S = 0.04
FORMS = ("all_to_all", "pass_on_async")
"""The two exchanges that plans differ by."""


@contextmanager
def slowed(form: str) -> Iterator[None]:
    """Have every exchange of one form take longer by ``DELAY_S``."""
    exchange = getattr(collectives, form)

    def late(*args: object, **kwargs: object) -> object:
        time.sleep(DELAY_S)
        return exchange(*args, **kwargs)

    setattr(collectives, form, late)
    try:
        yield
    finally:
        setattr(collectives, form, exchange)


def measured(groups: Groups) -> object:
    """Return what ``probe`` replies, as it would travel."""
    with torch.inference_mode():
        return json.loads(encode(probe(Probe(1, BUDGET_S), groups)))


def disturbed(groups: Groups) -> str:
    """Make the first exchange with a rank to whom one number arrives as another."""
    exchange = collectives.all_to_all

    def other_data(out: torch.Tensor, *args: object, **kwargs: object) -> None:
        exchange(out, *args, **kwargs)  # type: ignore[arg-type]
        if groups.rank == 1:
            out[3] += 1

    collectives.all_to_all = other_data  # type: ignore[assignment]
    try:
        first_exchange.check(groups)
    except ExchangeError as error:
        return str(error)
    finally:
        collectives.all_to_all = exchange
    return ""


def main(rank: int, world_size: int, store_fd: int, folder: Path) -> None:
    groups = Groups.join(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        store_fd=store_fd,
        join_timeout_s=60,
        step_timeout_s=60,
    )
    begin = time.perf_counter()
    first_exchange.check(groups)
    found: dict[str, object] = {"exchange_s": time.perf_counter() - begin}
    found["reply"] = measured(groups)
    if world_size == 2:
        for form in FORMS:
            with slowed(form):
                found[form] = measured(groups)
        # Last, as one rank stays behind in it.
        found["disturbed"] = disturbed(groups) if rank == 1 else exchange_once(groups)
    (folder / f"{world_size}.{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def exchange_once(groups: Groups) -> str:
    """Take part in the exchange after which the other rank gives up."""
    sizes = [first_exchange.SIZES_BYTES[0] // 4] * groups.world_size
    data = torch.zeros(sum(sizes))
    assert groups.everyone is not None
    values = [first_exchange._numbers(groups.rank, to, sizes[0]) for to in range(len(sizes))]
    collectives.all_to_all(
        data, torch.cat(values), received=sizes, sent=sizes, group=groups.everyone
    )
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)  # before anything computes: threads do not survive a fork
    context = multiprocessing.get_context("fork")
    for size in map(int, sys.argv[2:]):
        fd = os.memfd_create("store")
        ranks = [
            context.Process(target=main, args=(rank, size, fd, Path(sys.argv[1])))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        os.close(fd)
        if any(process.exitcode for process in ranks):
            sys.exit(1)
