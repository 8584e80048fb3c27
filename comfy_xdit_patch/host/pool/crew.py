"""The workers together with the memory that this process shares with them.

Runs in: host process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comfy_xdit_patch.errors import CallRaisedError, CardsFullError
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.wire.messages.answers import check_answers
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.messages.replies import NoRoom, Raised, Reply, short
from comfy_xdit_patch.wire.messages.requests import Map, Unmap
from comfy_xdit_patch.wire.packs import PackTable
from comfy_xdit_patch.wire.slots import Slot, SlotTable


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
        self._fds: Sequence[tuple[Slot, int]] = ()
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
        self._fds = self.slots.take_created()
        self._close_fds()
        self._begin()
        return True

    def request(
        self,
        message: Callable[[int], Message],
        *,
        poll: Poll,
        prepare: Callable[[], Sequence[Message]] = lambda: (),
        meanwhile: Callable[[], None] = lambda: None,
        progress: Callable[[int, float], None] = lambda _, __: None,
        check: Callable[[Sequence[Reply]], None] = lambda _: None,
    ) -> list[Reply]:
        """Send a request to every rank and return the replies in rank order.

        Args:
            message: makes the request from its number, after ``prepare`` ran.
            prepare: runs when no worker is computing any more, so that it may write to shared
                slots; returns messages without a reply to send first.
            meanwhile: runs once while the workers are at it; must not write to shared slots.
            progress: called with a rank and the part of a load that it has done.
            check: raises ``MessageError`` for replies that cannot be right, beyond what their kind
                says; see ``answers.py``.

        Raises:
            CallRaisedError: the call raised the same exception in every rank.
            WorkerError: the workers are lost.
        """

        def before() -> Sequence[tuple[Message, int | None]]:
            pending, self.pending = self.pending, []
            extra = [(item, None) for item in (*pending, *prepare())]
            return [*extra, *self._slot_messages()]

        def during() -> None:
            meanwhile()
            self.pay()

        requests: list[Message] = []

        def numbered(number: int) -> Message:
            requests.append(message(number))
            return requests[-1]

        def checked(replies: Sequence[Reply]) -> None:
            check_answers(requests[-1], replies)
            check(replies)

        try:
            replies = self.pool.request(
                numbered,
                poll=poll,
                prepare=before,
                meanwhile=during,
                progress=progress,
                check=checked,
            )
        finally:
            self._close_fds()
        if isinstance(replies[0], Raised):
            kind = short(replies[0].error)
            raise CallRaisedError(f"{kind}: {short(replies[0].text)}", kind=kind)
        return replies

    def pay(self) -> None:
        """Do what is owed, if that has not been done."""
        owed, self.owed = self.owed, None
        if owed is not None:
            owed()

    def call(
        self,
        message: Callable[[int, int], Message],
        *,
        poll: Poll,
        prepare: Callable[[], Sequence[Message]],
        room: Room | None = None,
        check: Callable[[Sequence[Reply]], None] = lambda _: None,
    ) -> list[Reply]:
        """Have all ranks compute a call whose arguments lie in slots.

        It is sent once more if a card had no room for it.

        Args:
            message: makes the request from its number and the bytes for which room is looked for.
            room: None to compute at once.

        Raises:
            CardsFullError: there is no room on a card, also after ComfyUI made some.
            CallRaisedError: the call raised the same exception in every rank.
            WorkerError: the workers are lost.
        """
        num_bytes = room.num_bytes if room is not None else 0
        is_room_made = False
        while True:
            replies = self.request(
                lambda number: message(number, num_bytes),
                poll=poll,
                prepare=(lambda: ()) if is_room_made else prepare,  # All is in its slots then.
                check=check,
            )
            if not isinstance(replies[0], NoRoom):
                return replies
            short_of = [rank for rank, reply in enumerate(replies) if reply.is_mine]  # type: ignore[union-attr]
            error = CardsFullError(f"Ranks {short_of} have no {num_bytes >> 20} MiB for a call.")
            if is_room_made:
                raise error
            assert room is not None, "nobody else is asked for room"
            room.make(str(error))
            is_room_made = True

    def _slot_messages(self) -> list[tuple[Message, int | None]]:
        self._fds = self.slots.take_created()
        messages: list[tuple[Message, int | None]] = [
            (Map(slot.number, slot.size_bytes), fd) for slot, fd in self._fds
        ]
        dropped = self.slots.take_dropped()
        if dropped:
            messages.append((Unmap(dropped), None))
        return messages

    def _close_fds(self) -> None:
        for _, fd in self._fds:
            os.close(fd)
        self._fds = ()
