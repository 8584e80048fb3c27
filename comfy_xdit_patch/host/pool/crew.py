"""The workers together with the memory that this process shares with them.

Runs in: host process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from comfy_xdit_patch.errors import CallRaisedError, CardsFullError
from comfy_xdit_patch.host.pool.exchange import Exchange, Poll, Progress
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.wire.messages.answers import check_answers
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.messages.replies import NoRoom, Raised, Reply, short
from comfy_xdit_patch.wire.messages.requests import (
    Control,
    Forward,
    Map,
    RunBlock,
    Tree,
    Unmap,
)
from comfy_xdit_patch.wire.packs import PackTable
from comfy_xdit_patch.wire.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Room:
    """What a call takes on a card beside the weights; 0 if one like it was made already.

    ``make`` has ComfyUI leave so much to it, and is told which ranks had not.
    """

    num_bytes: int
    make: Callable[[str], None]


class Wire:
    """Requests to all ranks; new shared memory reaches them before the request that needs it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.pending: list[Message] = []
        """Without a reply, to be sent before the next request; new workers get none of them."""
        self.owed: Callable[[], object] | None = None
        """What is done once, while the workers are at the next request."""
        self.generation = 0
        """Of the workers that the shared memory belongs to."""
        self._begin()

    def _begin(self) -> None:
        self.pending = []
        self.owed = None
        self.slots = SlotTable()
        self.packs = PackTable(self.slots.create, self.slots.drop)

    @property
    def control_bytes(self) -> int:
        """Bytes of messages sent to the workers that live now."""
        return self.pool.control_bytes

    def follow_generation(self) -> bool:
        """New workers know no slots: begin with none. True if the workers are new."""
        if self.generation == self.pool.generation:
            return False
        self.generation = self.pool.generation
        for _, fd in self.slots.take_created():
            os.close(fd)
        self._begin()
        return True

    @contextmanager
    def turn(self, poll: Poll) -> Iterator[Turn]:
        """Have all ranks to oneself. None of them is computing: slots may be written to.

        Raises:
            WorkerError: the workers are lost.
        """
        with self.pool.turn(poll) as exchange:
            self.slots.begin_call()
            yield Turn(self, exchange, poll)

    def pay(self) -> None:
        """Do what is owed, if that has not been done."""
        owed, self.owed = self.owed, None
        if owed is not None:
            owed()


class Turn:
    """All ranks, as long as they answer one caller. A ``MessageError`` raised in it loses them."""

    def __init__(self, wire: Wire, exchange: Exchange, poll: Poll) -> None:
        self._wire = wire
        self._exchange = exchange
        self._poll = poll
        self._asked: Message | None = None

    @property
    def number(self) -> int:
        """Of the request that is asked next."""
        return self._exchange.next_number

    def place(self, values: Mapping[str, Any]) -> dict[str, Tree]:
        """Put the arguments of a call into slots, by their paths; see ``SlotTable.place``.

        Raises:
            UncarriedArgumentError: an argument is not of a type that can cross.
        """
        self._wire.slots.begin_call(values)
        return {path: self.put(path, value) for path, value in values.items()}

    def put(self, path: str, value: Any) -> Tree:
        """Put one more argument into slots."""
        return self._wire.slots.place(path, value)

    def ask(self, message: Message, *, first: Sequence[Message] = ()) -> list[Reply]:
        """Send a request with this ``number`` to every rank, and return the replies in rank order.

        Raises:
            CallRaisedError: the call raised the same exception in every rank.
            WorkerError: the workers are lost.
        """
        self.send(message, first=first)
        return self.replies()

    def send(self, message: Message, *, first: Sequence[Message] = ()) -> None:
        """Send a request, behind new shared memory and messages without a reply.

        Then do what is owed: the ranks are at it.
        """
        wire = self._wire
        pending, wire.pending = wire.pending, []
        new = wire.slots.take_created()
        dropped = wire.slots.take_dropped()
        before: list[tuple[Message, int | None]] = [(item, None) for item in (*pending, *first)]
        before += [(Map(slot.number, slot.size_bytes), fd) for slot, fd in new]
        if dropped:
            before.append((Unmap(dropped), None))
        try:
            self._exchange.send(message, before=before)
        finally:
            for _, fd in new:
                os.close(fd)
        self._asked = message
        wire.pay()

    def replies(self, progress: Progress = lambda _, __: None) -> list[Reply]:
        """Wait for the replies to what was sent."""
        assert self._asked is not None, "something was sent"
        replies = self._exchange.replies(self._poll, progress)
        check_answers(self._asked, replies)
        if isinstance(replies[0], Raised):
            kind = short(replies[0].error)
            raise CallRaisedError(f"{kind}: {short(replies[0].text)}", kind=kind)
        return replies

    def compute(
        self,
        message: Forward | Control | RunBlock,
        *,
        room: Room | None,
        first: Sequence[Message] = (),
    ) -> list[Reply]:
        """Have all ranks compute a call whose arguments lie in slots.

        It is asked once more if a card had no room for it.

        Args:
            room: that is looked for; None to compute at once.
            first: messages without a reply.

        Raises:
            CardsFullError: there is no room on a card, also after ComfyUI made some.
            CallRaisedError: the call raised the same exception in every rank.
            WorkerError: the workers are lost.
        """
        num_bytes = room.num_bytes if room is not None else 0
        replies = self.ask(replace(message, working_bytes=num_bytes), first=first)
        if not isinstance(replies[0], NoRoom):
            return replies
        assert room is not None, "nobody else is asked for room"
        room.make(str(_cards_full(replies, num_bytes)))
        replies = self.ask(replace(message, request=self.number, working_bytes=num_bytes))
        if isinstance(replies[0], NoRoom):
            raise _cards_full(replies, num_bytes)
        return replies


def _cards_full(replies: Sequence[Reply], num_bytes: int) -> CardsFullError:
    ranks = [r for r, reply in enumerate(replies) if isinstance(reply, NoRoom) and reply.is_mine]
    return CardsFullError(f"Ranks {ranks} have no {num_bytes >> 20} MiB for a call.")
