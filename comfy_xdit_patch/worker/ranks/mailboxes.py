"""Exchanges of CPU ranks through memory that all of them share.

Runs in: worker process.

Every rank has a mailbox for every other one: a ring of slots. The sender copies into a free slot
and counts it as full; the receiver copies out of a full one and counts it as free. Both counts are
POSIX semaphores: what was written before a post is seen after the wait that it ends, on any kind of
processor (POSIX.1, 4.12 "Memory Synchronization"), and whoever waits sleeps.

What is sent is copied into slots when an exchange begins, as far as they are free, and out of them
when it is waited for. A part that is larger than its mailbox passes through it in pieces.

The memory is a file without a name, which ends with the last rank that maps it. Its size does not
grow with the number of ranks: the more there are, the smaller are the parts that they exchange. The
kernel has pages for it only where something was written.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, permutations

import torch

from comfy_xdit_patch.errors import DeadlineExceededError

SLOT_BYTES = 256 << 10
MEMORY_BYTES = 128 << 20
"""Of all slots. FLUX.1 at 1024 x 1024 px has 80 MB of q, k and v in bf16, of which each rank keeps
its own part."""
MIN_SLOTS = 2
CACHE_LINE_BYTES = 64
LOOK_S = 5e-3
"""Who waits for one rank looks this often what the others have sent or taken."""

Span = tuple[int, int, int]
"""A rank, and address and bytes of what it is sent, or of where what it sends goes."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None)
_libc.sem_init.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_libc.sem_post.argtypes = _libc.sem_trywait.argtypes = (ctypes.c_void_p,)
_libc.sem_timedwait.argtypes = ctypes.c_void_p, ctypes.POINTER(_Timespec)


def span_of(data: torch.Tensor, rank: int) -> Span:
    """A whole tensor, for or from one rank."""
    assert data.is_contiguous(), "bytes are copied as they lie"
    return rank, data.data_ptr(), data.nbytes


def spans(data: torch.Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> list[Span]:
    """The parts of a tensor, so many elements for each of the ranks, one after the other."""
    assert sum(sizes) == data.numel(), f"{sizes} are not {data.numel()} elements"
    (_, first, _), item = span_of(data, 0), data.element_size()
    return [
        (rank, first + (end - size) * item, size * item)
        for rank, size, end in zip(ranks, sizes, accumulate(sizes), strict=True)
    ]


def _whole(size: int, of: int) -> int:
    return -(-size // of) * of


class Exchange:
    """An exchange that was begun; ``wait`` as of ``torch.distributed.Work``."""

    def __init__(self, mailboxes: Mailboxes) -> None:
        self.parts: list[_Part] = []
        self._mailboxes = mailboxes

    def wait(self) -> None:
        """Wait until all has arrived, and what is sent may be changed."""
        self._mailboxes.finish(self)
        self.parts.clear()


@dataclass(slots=True)
class _Part:
    """What one rank sends another one in one exchange: where it is, and how much is left of it."""

    end: _End
    address: int
    left: int
    kept: Sequence[torch.Tensor]
    """The tensors in which it lies, for as long as it is not whole."""


@dataclass(slots=True)
class _End:
    """A rank's end of a mailbox. Parts of exchanges pass through it in their order."""

    taken: int
    """Address of the semaphore that counts the slots which are this end's to use."""
    given: int
    """And of the one that counts those of the other end."""
    slots: int
    sizes: ctypes.Array[ctypes.c_uint32]
    """Of what lies in each slot, in bytes."""
    is_sender: bool
    turn: int = 0
    parts: deque[_Part] = field(default_factory=deque)

    def has_moved(self, wait_s: float = 0.0) -> bool:
        """Copy one slot; False if there is nothing to copy, or no slot within this time."""
        if not self.parts or not _is_taken(self.taken, wait_s):
            return False
        part = self.parts[0]
        size = min(part.left, SLOT_BYTES)
        slot = self.slots + self.turn * SLOT_BYTES
        if self.is_sender:
            ctypes.memmove(slot, part.address, size)
            self.sizes[self.turn] = size
        else:
            sent = self.sizes[self.turn]
            assert sent == size, f"{sent} bytes were sent where {size} were expected"
            ctypes.memmove(part.address, slot, size)
        _libc.sem_post(self.given)
        self.turn = (self.turn + 1) % len(self.sizes)
        part.address += size
        part.left -= size
        if not part.left:
            self.parts.popleft()
        return True


def _is_taken(semaphore: int, wait_s: float) -> bool:
    if _libc.sem_trywait(semaphore) == 0:
        return True
    if not wait_s:
        return False
    # On the clock of the day, which somebody may set: waits are short, and deadlines are not on it.
    seconds, part = divmod(time.time() + wait_s, 1.0)
    until = _Timespec(int(seconds), int(part * 1e9))
    return bool(_libc.sem_timedwait(semaphore, ctypes.byref(until)) == 0)


class Mailboxes:
    """One rank's ends of all its mailboxes."""

    def __init__(self, fd: int, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Make them ready, before this rank meets any other one.

        Args:
            fd: a file that all ranks share, empty or made ready by others.
            world_size: at least 2.
            timeout_s: how long one wait may take.
        """
        self._rank, self._timeout_s = rank, timeout_s
        self._outgoing: dict[int, _End] = {}
        self._incoming: dict[int, _End] = {}
        pairs = list(permutations(range(world_size), 2))
        num_slots = max(MIN_SLOTS, MEMORY_BYTES // SLOT_BYTES // len(pairs))
        head_bytes = 2 * CACHE_LINE_BYTES + _whole(num_slots * 4, CACHE_LINE_BYTES)
        slots_start = _whole(len(pairs) * head_bytes, mmap.PAGESIZE)
        num_bytes = slots_start + len(pairs) * num_slots * SLOT_BYTES
        os.ftruncate(fd, num_bytes)
        self._memory = mmap.mmap(fd, num_bytes)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for number, (source, to) in enumerate(pairs):
            free = start + number * head_bytes
            filled = free + CACHE_LINE_BYTES
            sizes = (ctypes.c_uint32 * num_slots).from_address(filled + CACHE_LINE_BYTES)
            slots = start + slots_start + number * num_slots * SLOT_BYTES
            if source == rank:
                _libc.sem_init(free, 1, num_slots)
                _libc.sem_init(filled, 1, 0)
                self._outgoing[to] = _End(free, filled, slots, sizes, is_sender=True)
            elif to == rank:
                self._incoming[source] = _End(filled, free, slots, sizes, is_sender=False)

    def begin(
        self, sent: Sequence[Span], received: Sequence[Span], *, kept: Sequence[torch.Tensor]
    ) -> Exchange:
        """Begin to send and to receive; what a rank has for itself is copied.

        Two ranks begin the exchanges that they have with each other in the same order.

        Args:
            kept: the tensors in which the spans lie.
        """
        exchange = Exchange(self)
        own = [span for span in chain(sent, received) if span[0] == self._rank]
        if own:
            (_, source, size), (_, to, _) = own
            ctypes.memmove(to, source, size)
        # Receiving ends first: a wait is for the first part that is left.
        for ends, of_ranks in ((self._incoming, received), (self._outgoing, sent)):
            for rank, address, size in of_ranks:
                if size and rank != self._rank:
                    part = _Part(ends[rank], address, size, kept)
                    part.end.parts.append(part)
                    exchange.parts.append(part)
        while any([end.has_moved() for end in self._outgoing.values()]):
            pass
        return exchange

    def finish(self, exchange: Exchange) -> None:
        """Wait for an exchange.

        No rank waits for one end alone: two that have filled each other's mailboxes, or three in a
        circle, would wait for ever.

        Raises:
            DeadlineExceededError: another rank did not send or take its part in time.
        """
        ends = (*self._incoming.values(), *self._outgoing.values())
        deadline = time.monotonic() + self._timeout_s
        while left := [part for part in exchange.parts if part.left]:
            if any([end.has_moved() for end in ends]) or left[0].end.has_moved(LOOK_S):
                continue
            if time.monotonic() > deadline:
                raise DeadlineExceededError(
                    f"Rank {self._rank} waited {self._timeout_s:g} s for another rank in an "
                    "exchange through shared memory."
                )
