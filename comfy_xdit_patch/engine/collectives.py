"""Every exchange of tensors between ranks, and the count of them.

Runs in: worker process.

A rank that waits for another one does so in here and nowhere else. The count tells the host how far
a rank is, and in a hang, which one is behind. The clock is told of every wait (``busy.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from comfy_xdit_patch.engine.busy import BusyClock

clock = BusyClock()
_num_begun = 0
_num_open = 0


def num_begun() -> int:
    """How many exchanges this process has begun, in all groups."""
    return _num_begun


def is_in_one() -> bool:
    """Whether an exchange was begun and not ended: it failed, or nobody has waited for it yet.

    A stage's (``stage.py``) are not counted: what one sends, another one receives.
    """
    return _num_open > 0


def all_to_all(
    out: torch.Tensor,
    data: torch.Tensor,
    *,
    received: Sequence[int],
    sent: Sequence[int],
    group: dist.ProcessGroup,
) -> None:
    """Send a part of ``data`` to every rank, and fill ``out`` with what they send. Elements."""
    _begin()
    with clock.waiting():
        dist.all_to_all_single(out, data, list(received), list(sent), group=group)
    _end()


def all_gather_into(whole: torch.Tensor, shard: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    """Fill ``whole`` with the shards of all ranks."""
    _begin()
    with clock.waiting():
        dist.all_gather_into_tensor(whole, shard, group=group)
    _end()


def all_gather_into_async(
    whole: torch.Tensor, shard: torch.Tensor, *, group: dist.ProcessGroup
) -> dist.Work:
    """Begin the same; ``finish`` the work before the tensors are used."""
    _begin()
    work: dist.Work = dist.all_gather_into_tensor(whole, shard, group=group, async_op=True)
    return work


def pass_on_async(
    out: torch.Tensor, data: torch.Tensor, *, to: int, source: int, group: dist.ProcessGroup
) -> list[dist.Work]:
    """Begin to send ``data`` to one rank of the group and to fill ``out`` from another.

    ``finish`` all the works before ``data`` is changed or ``out`` is read.
    """
    _begin()
    sends = dist.P2POp(dist.isend, data, dist.get_global_rank(group, to), group)
    receives = dist.P2POp(dist.irecv, out, dist.get_global_rank(group, source), group)
    works: list[dist.Work] = dist.batch_isend_irecv([sends, receives])
    return works


def send_async(data: torch.Tensor, *, to: int, group: dist.ProcessGroup) -> dist.Work:
    """Begin to send to one rank of the group; keep ``data`` as it is until the work is done."""
    _count()
    work = dist.isend(data, dist.get_global_rank(group, to), group)
    assert work is not None, "this rank is not in the group"
    return work


def receive_async(out: torch.Tensor, *, source: int, group: dist.ProcessGroup) -> dist.Work:
    """Begin to fill ``out`` from one rank of the group."""
    _count()
    work = dist.irecv(out, dist.get_global_rank(group, source), group)
    assert work is not None, "this rank is not in the group"
    return work


def all_reduce_sum(data: torch.Tensor, *, group: dist.ProcessGroup) -> None:
    """Make ``data`` the sum of that of all ranks of the group."""
    _begin()
    dist.all_reduce(data, op=dist.ReduceOp.SUM, group=group)
    _end()


def all_reduce_max(value: torch.Tensor) -> None:
    """Make ``value`` the largest that any rank of the world has."""
    _begin()
    with clock.waiting():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    _end()


def finish(works: Iterable[dist.Work]) -> None:
    """Wait for one exchange that was begun. On CUDA the stream waits, not the CPU."""
    with clock.waiting():
        for work in works:
            work.wait()
    _end()


def _count() -> None:
    global _num_begun
    _num_begun += 1


def _begin() -> None:
    global _num_open
    _count()
    _num_open += 1


def _end() -> None:
    global _num_open
    _num_open -= 1
