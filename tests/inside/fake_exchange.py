"""One rank at a time of a world that is not there: its groups are real, what it exchanges is noted.

Runs in: a ComfyUI process of ``process.py``.

torch's own "fake" backend makes the process groups: it connects nobody. The functions of
``worker/ranks/collectives.py`` are replaced; whoever adds one there must add it here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # registers the backend

from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks import groups as groups_module
from comfy_xdit_patch.worker.ranks.groups import Groups

assert fake_pg
TIMEOUT_S = 60.0
NO_EXCHANGE = {"num_begun", "is_in_one", "finish", "capturing", "replayed"}
"""Functions of ``collectives`` that begin nothing."""


class Done:
    """Stands for work that is over."""

    def wait(self) -> None:
        """Wait for nothing."""


class Exchanges:
    """What one rank exchanges, in the order in which it begins it.

    Every entry of ``noted`` is plain: ``op``; ``group``, whose communicator; ``with``, the ranks
    that take part; elements ``sent`` to and ``received`` from each of them; ``tensors``, each as
    [device, whether it is contiguous, elements].
    """

    def __init__(self, groups: Groups) -> None:
        self.noted: list[dict[str, Any]] = []
        self._groups = groups

    def all_to_all_async(
        self,
        out: torch.Tensor,
        data: torch.Tensor,
        *,
        received: Sequence[int],
        sent: Sequence[int],
        group: Any,
    ) -> Done:
        self._note("all_to_all", group, (data, out), sent, received)
        return Done()

    def all_gather_into(self, whole: torch.Tensor, shard: torch.Tensor, *, group: Any) -> None:
        n = dist.get_world_size(group)
        parts = [whole.numel() // n] * n
        self._note("all_gather", group, (shard, whole), [shard.numel()] * n, parts)

    def all_gather_into_async(
        self, whole: torch.Tensor, shard: torch.Tensor, *, group: Any
    ) -> Done:
        self.all_gather_into(whole, shard, group=group)
        return Done()

    def pass_on_async(
        self, out: torch.Tensor, data: torch.Tensor, *, to: int, source: int, group: Any
    ) -> list[Done]:
        places = range(dist.get_world_size(group))
        sent = [data.numel() if place == to else 0 for place in places]
        received = [out.numel() if place == source else 0 for place in places]
        self._note("pass_on", group, (data, out), sent, received)
        return [Done()]

    def swap_async(
        self, edges: Sequence[tuple[int, torch.Tensor, torch.Tensor]], *, group: Any
    ) -> list[Done]:
        for place, data, out in edges:
            self._note_pair(group, place, data, is_sent=True)
            self._note_pair(group, place, out, is_sent=False)
        return [Done()]

    def send_async(self, data: torch.Tensor, *, to: int, group: Any) -> Done:
        self._note_pair(group, to, data, is_sent=True)
        return Done()

    def receive_async(self, out: torch.Tensor, *, source: int, group: Any) -> Done:
        self._note_pair(group, source, out, is_sent=False)
        return Done()

    def all_reduce_sum(self, data: torch.Tensor, *, group: Any) -> None:
        sizes = [data.numel()] * dist.get_world_size(group)
        self._note("sum", group, (data,), sizes, sizes)

    def all_reduce_max(self, value: torch.Tensor) -> None:
        sizes = [value.numel()] * dist.get_world_size()
        self._note("max", dist.group.WORLD, (value,), sizes, sizes)

    def _note_pair(self, group: Any, place: int, data: torch.Tensor, *, is_sent: bool) -> None:
        other = dist.get_global_rank(group, place)
        pair = sorted((self._groups.rank, other))
        sizes = [data.numel() if rank == other else 0 for rank in pair]
        nothing = [0, 0]
        self._note("pair", group, (data,), *((sizes, nothing) if is_sent else (nothing, sizes)))
        self.noted[-1]["with"] = pair

    def _note(
        self,
        op: str,
        group: Any,
        tensors: Sequence[torch.Tensor],
        sent: Sequence[int],
        received: Sequence[int],
    ) -> None:
        ranks = dist.get_process_group_ranks(group)
        # The same ranks have one group for weights and one for everything else.
        kind = "weights" if group is self._groups.weights else "tokens"
        self.noted.append(
            {
                "op": f"{op} {tensors[0].dtype}",
                "group": f"{kind} {ranks}",
                "with": ranks,
                "sent": list(sent),
                "received": list(received),
                "tensors": [[str(t.device), t.is_contiguous(), t.numel()] for t in tensors],
            }
        )


class Rank:
    """One rank: its groups, its exchanges, and how many groups were made for it so far."""

    def __init__(self, groups: Groups, made: list[Any]) -> None:
        self.groups = groups
        self.exchanges = Exchanges(groups)
        self._made = made

    @property
    def num_groups(self) -> int:
        """Also those of other ranks: each rank makes all of them."""
        return len(self._made)


@contextmanager
def joined(rank: int, world_size: int, device: torch.device, **settings: Any) -> Iterator[Rank]:
    """Join the world as one of its ranks, and leave it."""
    made: list[Any] = []
    new_group = dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return new_group(*args, **kwargs)

    store_fd, mailbox_fd = (os.memfd_create(name) for name in ("store", "mailboxes"))
    with ExitStack() as stack:
        for fd in (store_fd, mailbox_fd):
            stack.callback(os.close, fd)
        stack.enter_context(mock.patch.object(groups_module, "_backend", return_value="fake"))
        stack.enter_context(mock.patch.object(groups_module, "wait_for_all"))
        stack.enter_context(mock.patch.object(groups_module, "refuse_strangers"))
        stack.enter_context(mock.patch.object(dist, "new_group", counted))
        groups = Groups.join(
            rank=rank,
            world_size=world_size,
            device=device,
            store_fd=store_fd,
            mailbox_fd=mailbox_fd,
            join_timeout_s=TIMEOUT_S,
            step_timeout_s=TIMEOUT_S,
            **settings,
        )
        stack.callback(groups.leave)
        one = Rank(groups, made)
        for name in _exchanging():
            stand_in = getattr(one.exchanges, name)
            stack.enter_context(mock.patch.object(collectives, name, stand_in))
        yield one


def _exchanging() -> list[str]:
    functions = inspect.getmembers(collectives, inspect.isfunction)
    return [
        name
        for name, function in functions
        if function.__module__ == collectives.__name__
        and not name.startswith("_")
        and name not in NO_EXCHANGE
    ]
