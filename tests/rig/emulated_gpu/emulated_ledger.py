"""What every process has on every card: one file, which all of them map.

Runs in: every process of a rig server with emulated cards; the rig itself reads it.

A process has on a card what its tensors take, what torch's allocator keeps of tensors that are
gone, pages of dynamic VRAM, and what its context and communicators take. The driver takes all of
that back when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

NUM_CARDS = 16
NUM_PROCESSES = 128
PINNED = NUM_CARDS - 1
"""Stands for page-locked CPU memory, which is no card's."""
_WIDTH = 1 + NUM_CARDS
"""Numbers of a row: the process, and its bytes on each card."""
_PEAKS = NUM_PROCESSES * _WIDTH
_SIZE = 8 * (_PEAKS + NUM_CARDS)


class Ledger:
    """The books; those of this process are kept under its number, also after a fork."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._file = None if path is None else open(path, "a+b")  # noqa: SIM115 - kept open
        fd = -1
        if self._file is not None:
            fd = self._file.fileno()
            if os.fstat(fd).st_size < _SIZE:
                os.ftruncate(fd, _SIZE)
        self._numbers = memoryview(mmap.mmap(fd, _SIZE)).cast("q")
        self._lock = threading.RLock()
        self._row = self._owner = -1

    def take(self, card: int, num_bytes: int, limit: int) -> bool:
        """Note that this process takes so much more of a card, if the card has it."""
        with self._locked():
            row = self._own_row()
            total = self._total(card)
            if total + num_bytes > limit:
                self._forget_the_dead()
                total = self._total(card)
                if total + num_bytes > limit:
                    return False
            self._numbers[row * _WIDTH + 1 + card] += num_bytes
            peak = _PEAKS + card
            self._numbers[peak] = max(self._numbers[peak], total + num_bytes)
        return True

    def give_back(self, card: int, num_bytes: int) -> None:
        """Note that this process has so much less of a card."""
        with self._locked():
            self._numbers[self._own_row() * _WIDTH + 1 + card] -= num_bytes

    def used(self, card: int) -> int:
        """Bytes of a card that all processes have that live."""
        with self._locked():
            self._forget_the_dead()
            return self._total(card)

    def by_process(self, card: int) -> dict[int, int]:
        """The same for each process."""
        with self._locked():
            self._forget_the_dead()
            rows = range(0, NUM_PROCESSES * _WIDTH, _WIDTH)
            numbers = self._numbers
            return {numbers[row]: numbers[row + 1 + card] for row in rows if numbers[row]}

    def peak(self, card: int) -> int:
        """The most that was ever used of a card since ``forget_peaks``."""
        return int(self._numbers[_PEAKS + card])

    def forget_peaks(self) -> None:
        """Begin to look for the peak of each card anew."""
        with self._locked():
            for card in range(NUM_CARDS):
                self._numbers[_PEAKS + card] = self._total(card)

    def _total(self, card: int) -> int:
        return sum(self._numbers[1 + card : NUM_PROCESSES * _WIDTH : _WIDTH])

    def _own_row(self) -> int:
        if self._owner != os.getpid():
            self._owner = os.getpid()
            starts = self._numbers[0 : NUM_PROCESSES * _WIDTH : _WIDTH].tolist()
            if 0 not in starts:
                self._forget_the_dead()
                starts = self._numbers[0 : NUM_PROCESSES * _WIDTH : _WIDTH].tolist()
            self._row = starts.index(0)
            self._numbers[self._row * _WIDTH] = self._owner
        return self._row

    def _forget_the_dead(self) -> None:
        for row in range(0, NUM_PROCESSES * _WIDTH, _WIDTH):
            if self._numbers[row] and not _is_alive(self._numbers[row]):
                for place in range(row, row + _WIDTH):
                    self._numbers[place] = 0

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            if self._file is None:
                yield
                return
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not waited for has no memory any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
