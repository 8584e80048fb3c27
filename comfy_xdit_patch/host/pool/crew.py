"""The ranks that live now, the memory that this process shares with them, and turns with them.

Runs in: host process.

New ranks are a new object, and know nothing: no slot, no model, no answer of those before them. So
whatever holds for some ranks only lies in their crew (``Crew.of``) and ends with it. A step has one
crew from its begin to its end; once it is lost, every turn with it is a ``WorkerError``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from comfy_xdit_patch.errors import (
    CallRaisedError,
    CardsFullError,
    ChannelClosedError,
    DeadlineExceededError,
    MessageError,
    WorkerError,
)
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool.exchange import Exchange, Poll, Progress
from comfy_xdit_patch.host.pool.start import POLL_S, Started, death_text
from comfy_xdit_patch.wire.messages.answers import check_answers
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.messages.replies import NoRoom, Raised, Reply, short
from comfy_xdit_patch.wire.messages.requests import (
    Control,
    Decode,
    Forget,
    Forward,
    Map,
    RunBlock,
    Tree,
    Unmap,
)
from comfy_xdit_patch.wire.packs import PackTable
from comfy_xdit_patch.wire.slots import SlotTable

T = TypeVar("T")

LOSSES = (WorkerError, MessageError, ChannelClosedError, DeadlineExceededError)
"""What says that ranks are not what they should be."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a call takes on a card beside the weights; 0 if one like it was made already.

    ``make`` has ComfyUI leave so much to it, and is told which ranks had not.
    """

    num_bytes: int
    make: Callable[[str], None]


class Gone:
    """Numbers of what the ranks keep for objects of the host that nothing refers to any more.

    Finalizers append to the lists in any thread, in the middle of anything.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.objects: list[int] = []
        self.tokens: list[int] = []

    def take(self) -> list[Message]:
        """Return the message that has the ranks forget them, if there are any."""
        lists = self.calls, self.objects, self.tokens
        taken = [[numbers.pop() for _ in range(len(numbers))] for numbers in lists]
        return [Forget(*taken)] if any(taken) else []


class Crew:
    """All ranks of one start, in their order."""

    def __init__(
        self, started: Started, *, step_timeout_s: float, lose: Callable[[Crew, str], None]
    ) -> None:
        """Take over workers that have joined; ``lose`` ends them for a reason."""
        self.workers = started.workers
        self.joined = started.joined
        self.since_s = self.used_s = time.monotonic()
        """When they joined, and when somebody was last done with them, on the monotonic clock."""
        self.lost: str | None = None
        """Why they are not there any more; empty where they were not wanted any more."""
        self.slots = SlotTable()
        self.packs = PackTable(self.slots.create, self.slots.drop)
        self.pending: list[Message] = []
        """Without a reply, to be sent before the next request."""
        self.owed: Callable[[], object] | None = None
        """What is done once, while the ranks are at the next request."""
        self.gone = Gone()
        self.weight_bytes: dict[int, int] = {}
        """Size of the weights in use of the model that was loaded last, by rank."""
        self._exchange = Exchange(started.workers, step_timeout_s=step_timeout_s)
        self._lock = threading.RLock()
        self._lose = lose
        self._known: dict[Callable[[Crew], Any], Any] = {}

    @property
    def world_size(self) -> int:
        return len(self.workers)

    @property
    def device_word(self) -> str:
        """What the ranks run on, for people."""
        return device_word([worker.device for worker in self.workers])

    @property
    def control_bytes(self) -> int:
        """Bytes of messages sent to the ranks."""
        return self._exchange.bytes_sent

    def of(self, make: Callable[[Crew], T]) -> T:
        """What one of our objects knows of these ranks: made by ``make`` at first, ends with them.

        It must not refer to the crew, whose shared memory would not end with the last reference.
        """
        found: T | None = self._known.get(make)
        if found is None:
            found = self._known.setdefault(make, make(self))
        return found

    @contextmanager
    def turn(self, poll: Poll) -> Iterator[Turn]:
        """Have all ranks to oneself. None of them is computing: slots may be written to.

        Raises:
            WorkerError: a rank failed, died or hung, or what it said cannot be right. All ranks
                have been ended.
        """
        while not self._lock.acquire(timeout=POLL_S):
            poll()
        try:
            if self.lost is not None:
                raise WorkerError(self.lost or "The workers are not running.")
            try:
                self._exchange.settle(poll)
                self.slots.begin_call()
                yield Turn(self, self._exchange, poll)
            except LOSSES as error:
                self._lose(self, str(error))
                raise WorkerError(str(error)) from None
        finally:
            self.used_s = time.monotonic()
            self._lock.release()

    def pay(self) -> None:
        """Do what is owed, if that has not been done."""
        owed, self.owed = self.owed, None
        if owed is not None:
            owed()

    def lose_if_dead(self) -> None:
        """Look for a death while nobody asks the ranks anything."""
        dead = [worker for worker in self.workers if worker.process.poll() is not None]
        if dead and self._lock.acquire(blocking=False):
            try:
                self._lose(self, death_text(dead[0], "while idle"))
            finally:
                self._lock.release()


def device_word(devices: Sequence[Device]) -> str:
    """Name what these are, for people."""
    return f"{'CPU rank' if devices[0].is_cpu else 'GPU'}{'s'[: len(devices) - 1]}"


class Turn:
    """All ranks, as long as they answer one caller. A ``MessageError`` raised in it loses them."""

    def __init__(self, crew: Crew, exchange: Exchange, poll: Poll) -> None:
        self._crew = crew
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
            UncarriedValueError: an argument is not of a type that can cross.
        """
        self._crew.slots.look_for(values)
        return {path: self.put(path, value) for path, value in values.items()}

    def put(self, path: str, value: Any) -> Tree:
        """Put one more argument into slots."""
        return self._crew.slots.place(path, value)

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
        crew = self._crew
        pending, crew.pending = crew.pending, []
        new = crew.slots.take_created()
        dropped = crew.slots.take_dropped()
        before: list[tuple[Message, int | None]] = [
            (item, None) for item in (*pending, *crew.gone.take(), *first)
        ]
        before += [(Map(slot.number, slot.size_bytes), fd) for slot, fd in new]
        if dropped:
            before.append((Unmap(dropped), None))
        try:
            self._exchange.send(message, before=before)
        finally:
            for _, fd in new:
                os.close(fd)
        self._asked = message
        crew.pay()

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
        self, message: Forward | Control | RunBlock | Decode, *, room: Room | None
    ) -> list[Reply]:
        """Have all ranks compute a call whose arguments lie in slots.

        It is asked once more if a card had no room for it.

        Args:
            room: that is looked for; None to compute at once.

        Raises:
            CardsFullError: there is no room on a card, also after ComfyUI made some.
            CallRaisedError: the call raised the same exception in every rank.
            WorkerError: the workers are lost.
        """
        num_bytes = room.num_bytes if room is not None else 0
        replies = self.ask(replace(message, working_bytes=num_bytes) if num_bytes else message)
        if not isinstance(replies[0], NoRoom):
            return replies
        assert room is not None, "nobody else is asked for room"
        room.make(str(_no_room(replies, num_bytes)))
        replies = self.ask(replace(message, request=self.number, working_bytes=num_bytes))
        if isinstance(replies[0], NoRoom):
            raise _no_room(replies, num_bytes)
        return replies


def _no_room(replies: Sequence[Reply], num_bytes: int) -> CardsFullError:
    ranks = [r for r, reply in enumerate(replies) if isinstance(reply, NoRoom) and reply.is_mine]
    return CardsFullError(f"Ranks {ranks} have no {num_bytes >> 20} MiB for a call.")
