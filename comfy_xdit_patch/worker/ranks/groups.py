"""Process groups of a plan, made by torch.distributed.

Runs in: worker process.

Groups are made once for each grid shape and kept: ComfyUI changes the batch from call to call.
xfuser's coordinators are not used: each makes a gloo group beside NCCL's, none of their groups has
our timeout, and to import them costs a rank seconds.

Gloo listens on a port of the loopback interface for each process group, for as long as the group
lives, and accepts any connection. Measured (torch 2.11): every connection costs the rank a file
descriptor, also after it was closed, and 20,000 connections ended the rank. Gloo connects all ranks
while a group is made, so a later connection comes from some other program.

The sockets are gloo's own and stay as they are; a filter of the kernel drops what is sent to them.
"""

from __future__ import annotations

import ctypes
import datetime
import logging
import os
import socket
import stat
import struct
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.transfers import TransferDtype
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.mailboxes import Mailboxes

SO_ATTACH_FILTER = 26  # Python does not name it.


@dataclass(frozen=True, slots=True)
class PlanGroups:
    """The groups of one rank under one plan. None where an axis has one rank.

    ``sequence`` shares the tokens of a row; ``ulysses`` and ``ring`` are the axes of its own grid.
    ``pipeline`` has one rank of each stage. ``tensor`` shares heads and columns of the same tokens.
    ``transfer_dtype`` is in which form heads travel in ``ulysses``.
    """

    sequence: dist.ProcessGroup | None
    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None
    pipeline: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    transfer_dtype: TransferDtype = "exact"


class Groups:
    """This rank's membership in the world, and in the groups of every plan used so far."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        step_timeout: datetime.timedelta,
        transfer_dtype: TransferDtype = "exact",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._step_timeout = step_timeout
        self._transfer_dtype: TransferDtype = transfer_dtype
        self._by_grid: dict[tuple[int, ...], PlanGroups] = {}
        self._by_ranks: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
        self._weights: dist.ProcessGroup | None = None

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """All ranks: the group with which they joined. None: only one."""
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def weights(self) -> dist.ProcessGroup:
        """All ranks, for weight shards; a group apart, since NCCL runs one group's work in turn."""
        assert self._weights is not None, "made by join"
        return self._weights

    @classmethod
    def join(
        cls,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        store_fd: int,
        mailbox_fd: int,
        join_timeout_s: float,
        step_timeout_s: float,
        transfer_dtype: TransferDtype = "exact",
    ) -> Groups:
        """Join the world. Collective: every rank calls this.

        The store is a file without a name that all workers inherited: no port, nothing left
        behind. (``FileStore`` opens its path anew for every access, which /proc allows; measured:
        8 gloo ranks join in 0.3 s.) CPU ranks share another such file, for what they exchange.
        """
        if device.type == "cpu" and world_size > 1:
            collectives.mailboxes = Mailboxes(
                mailbox_fd, rank=rank, world_size=world_size, timeout_s=step_timeout_s
            )
        store = dist.FileStore(f"/proc/self/fd/{store_fd}", world_size)  # type: ignore[attr-defined]
        store.set_timeout(datetime.timedelta(seconds=join_timeout_s))
        wait_for_all(store, rank, world_size)
        step_timeout = datetime.timedelta(seconds=step_timeout_s)
        dist.init_process_group(
            _backend(device),
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=step_timeout,
        )
        groups = cls(
            rank=rank,
            world_size=world_size,
            device=device,
            step_timeout=step_timeout,
            transfer_dtype=transfer_dtype,
        )
        groups._weights = groups._new_group(groups._all_ranks)
        groups._close_the_door()
        return groups

    def of_plan(self, plan: ParallelPlan) -> PlanGroups:
        """Return the groups of a plan. Collective when the grid shape is new."""
        if plan.grid not in self._by_grid:
            self._by_grid[plan.grid] = self._make(plan)
            self._close_the_door()
        return self._by_grid[plan.grid]

    def leave(self) -> None:
        """Leave all groups."""
        self._by_grid.clear()
        self._by_ranks.clear()
        collectives.mailboxes = None
        dist.destroy_process_group()

    def _close_the_door(self) -> None:
        # NCCL connects ranks when they first use a group, so it cannot be kept from listening.
        if self.device.type == "cpu":
            refuse_strangers()

    @property
    def _all_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.world_size))

    def _make(self, plan: ParallelPlan) -> PlanGroups:
        return PlanGroups(
            sequence=self._group(plan.groups("ring", "ulysses")),
            ulysses=self._group(plan.groups("ulysses")),
            ring=self._group(plan.groups("ring")),
            pipeline=self._group(plan.groups("pipefusion")),
            tensor=self._group(plan.groups("tensor")),
            transfer_dtype=self._transfer_dtype,
        )

    def _group(self, lists: list[tuple[int, ...]]) -> dist.ProcessGroup | None:
        """Return this rank's group among those lists of ranks; None where each has one rank."""
        if len(lists) == self.world_size:
            return None
        key = tuple(lists)
        if key == (self._all_ranks,):
            return dist.group.WORLD  # This group exists: one communicator less.
        if key not in self._by_ranks:
            # Every rank makes all of them in this order, its own or not: that is torch's rule.
            made = [self._new_group(ranks) for ranks in lists]
            self._by_ranks[key] = next(
                group for group, ranks in zip(made, lists, strict=True) if self.rank in ranks
            )
        return self._by_ranks[key]

    def _new_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(
            list(ranks), timeout=self._step_timeout, backend=_backend(self.device)
        )
        return group


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


log = logging.getLogger(__name__)

_RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
"""A program for the kernel's packet filter (BPF_RET | BPF_K): of each packet, keep 0 bytes."""


def wait_for_all(store: Any, rank: int, world_size: int) -> None:
    """Come to the store and wait there for all ranks.

    Gloo listens from then on and takes whoever connects for a rank. A rank that waited with an open
    port for one that is late would leave the door open meanwhile.
    """
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)])


def refuse_strangers() -> None:
    """Drop what is sent to any internet socket on which this process listens."""
    program = ctypes.create_string_buffer(_RETURN_NOTHING, len(_RETURN_NOTHING))
    packet_filter = struct.pack("HP", 1, ctypes.addressof(program))
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue  # The descriptor of the listing above, or a thread has just closed it.
        with connection:
            if _listens(connection):
                try:
                    connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, packet_filter)
                except OSError as error:
                    log.warning("others on this machine can connect to this rank (%s)", error)


def _listens(connection: socket.socket) -> bool:
    is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
    return is_internet and bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
