"""Exchanges through shared memory bring what gloo brings, in any order, and end where nobody sends.

Real ranks in processes of their own; for what one rank alone does, both ends in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mailbox_ranks import AT_ONCE, GROUPS, KINDS, WORLD_SIZE

from comfy_xdit_patch.errors import DeadlineExceededError
from comfy_xdit_patch.worker.ranks import mailboxes
from comfy_xdit_patch.worker.ranks.mailboxes import Mailboxes, spans

DEADLINE_S = 120.0
TIMEOUT_S = 0.3


@pytest.mark.parametrize("slot_bytes", [64, 4096])
def test_what_arrives_is_what_gloo_brings(tmp_path: Path, slot_bytes: int) -> None:
    """Uneven and empty parts, parts larger than a mailbox, several under way, in any order."""
    script = Path(__file__).with_name("mailbox_ranks.py")
    command = [sys.executable, str(script), str(tmp_path), str(slot_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = [
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)
    ]
    assert [rank["different"] for rank in found] == [[]] * WORLD_SIZE
    assert max(rank["most"] for rank in found) == AT_ONCE
    kinds = {kind for rank in found for kind in rank["kinds"]}
    assert kinds == {f"{kind} of {len(ranks)}" for kind in KINDS for ranks in GROUPS}


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Mailboxes, Mailboxes]]:
    """Both ranks' mailboxes, of two small slots each."""
    monkeypatch.setattr(mailboxes, "SLOT_BYTES", 64)
    monkeypatch.setattr(mailboxes, "MEMORY_BYTES", 0)
    fd = os.memfd_create("mailboxes")
    yield tuple(Mailboxes(fd, rank=rank, world_size=2, timeout_s=TIMEOUT_S) for rank in range(2))  # type: ignore[misc]
    os.close(fd)


def begin(own: Mailboxes, other: int, size: int, value: int) -> tuple[torch.Tensor, Any]:
    data, out = torch.full((size,), value), torch.zeros(size, dtype=torch.int64)
    sent, received = (spans(tensor, [size], [other]) for tensor in (data, out))
    return out, own.begin(sent, received, kept=(data, out))


@pytest.mark.parametrize("size", [1, 1000])
def test_a_wait_for_a_rank_that_is_gone_ends(pair: tuple[Mailboxes, Mailboxes], size: int) -> None:
    _, exchange = begin(pair[0], 1, size, 3)
    start_s = time.monotonic()
    with pytest.raises(DeadlineExceededError, match=r"Rank 0 waited 0\.3 s for another rank"):
        exchange.wait()
    assert TIMEOUT_S <= time.monotonic() - start_s < TIMEOUT_S + 5


def test_nothing_is_waited_for_when_an_exchange_begins(pair: tuple[Mailboxes, Mailboxes]) -> None:
    """Though what is sent fills the mailbox many times."""
    begun = [begin(rooms, 1 - rank, 1000, rank) for rank, rooms in enumerate(pair)]
    other = threading.Thread(target=begun[1][1].wait)
    other.start()
    begun[0][1].wait()
    other.join()
    assert [out.unique().tolist() for out, _ in begun] == [[1], [0]]


def test_what_nobody_waited_for_is_not_taken_for_what_comes_later(
    pair: tuple[Mailboxes, Mailboxes],
) -> None:
    """A call that was given up on all ranks leaves its exchange in the mailboxes."""
    for rank, rooms in enumerate(pair):
        begin(rooms, 1 - rank, 4, 7)
    begun = [begin(rooms, 1 - rank, 4, 10 + rank) for rank, rooms in enumerate(pair)]
    for _, exchange in begun:
        exchange.wait()
        exchange.wait()
    assert [out.tolist() for out, _ in begun] == [[11] * 4, [10] * 4]


def test_ranks_that_disagree_about_sizes_are_told_so(pair: tuple[Mailboxes, Mailboxes]) -> None:
    _, exchange = begin(pair[0], 1, 4, 1)
    begin(pair[1], 0, 5, 1)
    with pytest.raises(AssertionError, match="40 bytes were sent where 32 were expected"):
        exchange.wait()


def test_the_memory_has_pages_where_something_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("mailboxes")
    pair = [Mailboxes(fd, rank=rank, world_size=2, timeout_s=TIMEOUT_S) for rank in range(2)]
    size = os.fstat(fd).st_size
    assert mailboxes.MEMORY_BYTES <= size <= mailboxes.MEMORY_BYTES + (64 << 10)
    begun = [begin(rooms, 1 - rank, 1 << 14, rank) for rank, rooms in enumerate(pair)]
    for _, exchange in begun:
        exchange.wait()
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)
