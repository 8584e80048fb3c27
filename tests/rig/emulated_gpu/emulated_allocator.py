"""torch's caching allocator on emulated cards: tensors that are gone leave their memory with it.

Runs in: every process of a rig server with emulated cards.

Memory comes from the card when what is kept does not do, and goes back when the card has no more,
or with ``empty_cache``. Pieces fit without waste; a real allocator's do not quite.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from emulated_cards import EXCLUSIVE, Card, visible
from emulated_ledger import PINNED, Ledger

MIB = 1 << 20
CONTEXT_BYTES = 600 * MIB
"""As comfy_xdit_patch/planning/residency.py has it, and for the same reasons."""
GROUP_BYTES = 256 * MIB

BOOKS = Ledger(os.environ.get("EMULATED_LEDGER"))
"""In the file of that name; without one a process keeps its own."""
_seen: tuple[Any, list[Card]] = None, []
_lock = threading.RLock()
_active: dict[int, int] = {}
_reserved: dict[int, int] = {}
_peak: dict[int, int] = {}
_contexts: set[int] = set()
_groups: set[tuple[int, Any]] = set()


def visible_cards() -> list[Card]:
    """Cards of this process, which a fork may give others before it uses one."""
    global _seen
    names = [os.environ.get(name) for name in ("EMULATED_CARDS", "CUDA_VISIBLE_DEVICES")]
    if _seen[0] != names:
        _seen = names, visible()
    return _seen[1]


def card_of(index: int) -> Card:
    """The card that this process numbers so."""
    return visible_cards()[index]


def touch(index: int) -> None:
    """Have a context on a card, as the first call that needs one makes it.

    Raises:
        RuntimeError: the card is another process's alone.
    """
    with _lock:
        if index in _contexts:
            return
        card = card_of(index)
        others = {pid for pid, size in BOOKS.by_process(card.number).items() if size}
        if os.environ.get("EMULATED_MODE") == EXCLUSIVE and others - {os.getpid()}:
            raise RuntimeError(
                "CUDA error: CUDA-capable device(s) is/are busy or unavailable\n"
                "CUDA kernel errors might be asynchronously reported at some other API call."
            )
        _contexts.add(index)
        take_of_driver(index, CONTEXT_BYTES)


def take_of_driver(index: int, num_bytes: int) -> None:
    """Take memory that torch's allocator does not see.

    Raises:
        torch.OutOfMemoryError: the card has no more.
    """
    if not found_room(index, num_bytes):
        raise out_of_memory(index, num_bytes)


def found_room(index: int, num_bytes: int) -> bool:
    """Take memory that torch's allocator does not see, if the card has it."""
    card = card_of(index)
    return BOOKS.take(card.number, num_bytes, card.total_bytes)


def give_back_to_driver(index: int, num_bytes: int) -> None:
    """Give such memory back."""
    BOOKS.give_back(card_of(index).number, num_bytes)


def join_group(index: int, group: Any) -> None:
    """Have a communicator, as NCCL makes it when the group first exchanges something."""
    with _lock:
        if (index, group) not in _groups:
            _groups.add((index, group))
            take_of_driver(index, GROUP_BYTES)


def leave_groups() -> None:
    """Give all communicators back."""
    with _lock:
        for index, _ in _groups:
            give_back_to_driver(index, GROUP_BYTES)
        _groups.clear()


def take(index: int, num_bytes: int) -> None:
    """Take memory for a tensor.

    Raises:
        torch.OutOfMemoryError: the card has no more, nor does this process keep any.
    """
    touch(index)
    with _lock:
        active = _active.get(index, 0) + num_bytes
        missing = active - _reserved.get(index, 0)
        if missing > 0:
            if not found_room(index, missing):
                empty_cache()
                missing = active - _reserved.get(index, 0)
                take_of_driver(index, missing)
            _reserved[index] = active
        _active[index] = active
        _peak[index] = max(_peak.get(index, 0), active)


def give_back(index: int, num_bytes: int) -> None:
    """Keep the memory of a tensor that is gone."""
    with _lock:
        _active[index] -= num_bytes


def empty_cache() -> None:
    """Give what is kept back to the cards."""
    with _lock:
        for index, reserved in _reserved.items():
            kept = reserved - _active.get(index, 0)
            give_back_to_driver(index, kept)
            _reserved[index] = reserved - kept


def free_and_total(index: int) -> tuple[int, int]:
    """What the driver says of a card."""
    touch(index)
    card = card_of(index)
    return max(0, card.total_bytes - BOOKS.used(card.number)), card.total_bytes


def active(index: int) -> int:
    """Bytes of tensors that this process has on a card."""
    return _active.get(index, 0)


def reserved(index: int) -> int:
    """The same with what is kept."""
    return _reserved.get(index, 0)


def peak(index: int) -> int:
    """The most of them since ``forget_peak``."""
    return _peak.get(index, 0)


def forget_peak(index: int) -> None:
    """Begin to look for the peak anew."""
    _peak[index] = _active.get(index, 0)


def pin(num_bytes: int) -> None:
    """Note page-locked CPU memory of this process; negative to unlock it."""
    BOOKS.take(PINNED, num_bytes, 1 << 62)


def out_of_memory(index: int, num_bytes: int) -> torch.OutOfMemoryError:
    """The error that CUDA's allocator raises."""
    card = card_of(index)
    free = card.total_bytes - BOOKS.used(card.number)
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {num_bytes / MIB:.2f} MiB. GPU {index} has a total "
        f"capacity of {card.total_bytes / MIB:.2f} MiB of which {free / MIB:.2f} MiB is free. "
        f"Of the allocated memory {active(index) / MIB:.2f} MiB is allocated by PyTorch, and "
        f"{(reserved(index) - active(index)) / MIB:.2f} MiB is reserved by PyTorch but unallocated."
    )
