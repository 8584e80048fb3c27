"""See that the ranks reach each other, and that what arrives is what was sent.

Runs in: worker process, once, before it takes any request.

Ranks that have met have not exchanged a tensor yet: NCCL connects GPUs when they first do. On
boards where peer-to-peer access does not work, that hangs, fails, or brings other data than was
sent.
"""

from __future__ import annotations

import torch

from comfy_xdit_patch.errors import ExchangeError
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import Groups

SIZES_BYTES = (1 << 10, 1 << 20)
"""Sizes of what each rank sends to each other rank. NCCL has another protocol for each size."""
LIMIT = 65521
"""Values stay below this prime, and float32 holds them exactly."""


def check(groups: Groups) -> None:
    """Exchange numbers that every rank can foresee.

    Collective: every rank calls this.

    Raises:
        ExchangeError: something else arrived.
    """
    group = groups.everyone
    if group is None:
        return
    others = range(groups.world_size)
    for size in SIZES_BYTES:
        num_values = size // torch.float32.itemsize
        sizes = [num_values] * groups.world_size
        sent = torch.cat([_numbers(groups.rank, to, num_values) for to in others])
        arrived = torch.empty_like(sent, device=groups.device)
        work = collectives.all_to_all_async(
            arrived, sent.to(groups.device), received=sizes, sent=sizes, group=group
        )
        collectives.finish([work])
        for source, part in enumerate(torch.split(arrived.cpu(), sizes)):
            _compare(part, _numbers(source, groups.rank, num_values), f"from rank {source}")
        largest = _numbers(0, 0, num_values).to(groups.device) + groups.rank
        collectives.all_reduce_max(largest)
        expected = _numbers(0, 0, num_values) + (groups.world_size - 1)
        _compare(largest.cpu(), expected, "from all ranks together")


def _numbers(source: int, to: int, num_values: int) -> torch.Tensor:
    """What one rank sends another one."""
    start = (source * 251 + to) * 7919
    return ((torch.arange(num_values) * 31 + start) % LIMIT).float()


def _compare(arrived: torch.Tensor, expected: torch.Tensor, source: str) -> None:
    num_wrong = int((arrived != expected).sum())
    if num_wrong:
        raise ExchangeError(
            f"{num_wrong} of {expected.numel()} numbers {source} arrived as others than were sent."
        )
