"""Turns with ranks that answer here, and what ends with them."""

from __future__ import annotations

import itertools
import threading
import weakref

import pytest
import torch

from comfy_xdit_patch.errors import (
    CallRaisedError,
    CardsFullError,
    ChannelClosedError,
    MessageError,
    WorkerError,
)
from comfy_xdit_patch.host.pool.crew import Crew, Gone
from comfy_xdit_patch.host.pool.start import Started
from comfy_xdit_patch.wire.messages.replies import Raised, Unloaded
from comfy_xdit_patch.wire.messages.requests import Drop, Forget, Map, Unload
from comfy_xdit_patch.wire.values import UncarriedValueError


class Exchange:
    """Notes in which order it is used; answers with ``reply``."""

    def __init__(self):
        self.events = []
        self.number = 0
        self.reply = lambda number: Unloaded(number)

    @property
    def next_number(self):
        return self.number + 1

    def settle(self, poll):
        poll()
        self.events.append("settle")

    def send(self, message, *, before):
        self.number += 1
        self.events += [type(extra).__name__ for extra, _ in before]
        self.events.append(type(message).__name__)

    def replies(self, poll, progress):
        poll()
        self.events.append("replies")
        return [self.reply(self.number)]


def nothing():
    """As a poll."""


@pytest.fixture
def crew():
    made = Crew(Started((None,), {}, 0.0), step_timeout_s=1.0, lose=lose)
    made._exchange = Exchange()
    made.losses = []
    return made


def lose(crew, reason):
    if crew.lost is None:
        crew.lost = reason
        crew.losses.append(reason)


def test_a_turn_settles_what_was_left_and_sends_what_the_request_needs_before_it(crew):
    crew.pending.append(Drop([1]))
    crew.gone.tokens.append(5)
    with crew.turn(nothing) as turn:
        assert turn.place({"x": torch.ones(2)})["x"]["$slot"][0] == 0
        assert turn.number == 1
        turn.ask(Unload(turn.number), first=[Drop([2])])
        turn.ask(Unload(turn.number))
    once = ["Drop", "Forget", "Drop", Map.__name__]
    assert crew._exchange.events == ["settle", *once, *["Unload", "replies"] * 2]


def test_a_turn_sends_the_same_tensor_once_wherever_it_is_asked_for(crew):
    """A turn begins a call, and nothing in it does so again."""
    residual = torch.ones(2)
    with crew.turn(nothing) as turn:
        first = turn.put("options", residual)
        assert turn.place({"x": residual})["x"] == first
        assert turn.put("control", residual) == first
    with crew.turn(nothing) as turn:
        assert turn.put("x", residual) != first


def test_what_is_owed_is_done_once_while_the_ranks_are_at_it(crew):
    events = crew._exchange.events
    crew.owed = lambda: events.append("owed")
    with crew.turn(nothing) as turn:
        turn.send(Unload(turn.number))
        events.append("meanwhile")
        turn.replies()
        turn.ask(Unload(turn.number))
    crew.pay()
    assert events[1:] == ["Unload", "owed", "meanwhile", "replies", "Unload", "replies"]


@pytest.mark.parametrize("error", [MessageError, WorkerError, ChannelClosedError])
def test_what_says_that_ranks_are_not_well_loses_them_once_and_for_all(crew, error):
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"^wrong$"), crew.turn(nothing):
            raise error("wrong")
    assert crew.losses == ["wrong"]
    assert crew._exchange.events == ["settle"], "nobody asks them any more"


@pytest.mark.parametrize(
    "error", [UncarriedValueError, CardsFullError, CallRaisedError, KeyboardInterrupt, KeyError]
)
def test_what_is_not_the_ranks_fault_leaves_them_as_they_are(crew, error):
    with pytest.raises(error), crew.turn(nothing):
        raise error("mine")
    with crew.turn(nothing) as turn:
        turn.ask(Unload(turn.number))
    assert crew.losses == []


def test_an_answer_to_something_else_loses_the_ranks(crew):
    crew._exchange.reply = lambda number: Unload(number)
    match = "answered Unload with Unload"
    with pytest.raises(WorkerError, match=match), crew.turn(nothing) as turn:
        turn.ask(Unload(turn.number))
    assert len(crew.losses) == 1


def test_what_all_ranks_raise_is_one_exception_and_no_loss(crew, monkeypatch):
    crew._exchange.reply = lambda number: Raised(number, "ValueError", "5 dimensions", 3)
    monkeypatch.setattr("comfy_xdit_patch.host.pool.crew.check_answers", lambda *_: None)
    with pytest.raises(CallRaisedError) as caught, crew.turn(nothing) as turn:
        turn.ask(Unload(turn.number))
    assert str(caught.value) == "ValueError: 5 dimensions"
    assert caught.value.kind == "ValueError"
    assert crew.losses == []


def test_the_user_can_interrupt_the_wait_for_somebody_elses_turn(crew):
    class Interrupted(BaseException):
        pass

    def interrupt():
        raise Interrupted

    began, ended = threading.Event(), threading.Event()

    def have_a_turn():
        with crew.turn(nothing):
            began.set()
            ended.wait(10)

    other = threading.Thread(target=have_a_turn)
    other.start()
    began.wait(10)
    try:
        with pytest.raises(Interrupted), crew.turn(interrupt):
            raise AssertionError("two turns at a time")
    finally:
        ended.set()
        other.join()
    with crew.turn(nothing) as turn:
        turn.ask(Unload(turn.number))


def test_the_keeper_does_not_end_ranks_that_are_being_asked(crew, monkeypatch):
    class Process:
        @staticmethod
        def poll():
            return -9

    class Dead:
        process = Process

    monkeypatch.setattr("comfy_xdit_patch.host.pool.crew.death_text", lambda _, when: when)
    crew.workers = (Dead,)
    keeper = threading.Thread(target=crew.lose_if_dead)
    with crew.turn(nothing):
        keeper.start()
        keeper.join()
        assert crew.losses == [], "whoever asks them will see it"
    crew.lose_if_dead()
    assert crew.losses == ["while idle"]


def test_what_is_known_of_ranks_is_made_once_and_ends_with_them(crew):
    class Known:
        def __init__(self, of):
            assert of is crew

    known = weakref.ref(crew.of(Known))
    assert crew.of(Known) is known()
    crew._known.clear()
    assert known() is None


def test_no_number_of_what_is_gone_is_lost_when_more_go_meanwhile():
    """A finalizer may run between any two steps of Python."""
    more = iter(range(4, 100))

    class Numbers(list):
        def pop(self, *where):
            self.extend(itertools.islice(more, 1))
            return super().pop(*where)

    gone, told = Gone(), []
    gone.calls = Numbers([1, 2, 3])
    while gone.calls:
        (message,) = gone.take()
        assert isinstance(message, Forget)
        told += message.calls
    assert sorted(told) == list(range(1, 100))
    assert gone.take() == []
