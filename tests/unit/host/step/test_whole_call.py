"""One call on the workers, against one worker in the same process that doubles what it gets."""

from __future__ import annotations

import contextlib
import gc
import os

import pytest
import torch

from comfy_xdit_patch.errors import CardsFullError, MessageError, WorkerError
from comfy_xdit_patch.host.pool.crew import Room, Wire
from comfy_xdit_patch.host.step.whole_call import RemoteForward
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.replies import Done, NoRoom
from comfy_xdit_patch.wire.messages.requests import Map, Unmap
from comfy_xdit_patch.wire.slot_map import SlotMap
from comfy_xdit_patch.wire.slots import UncarriedArgumentError


class Pool:
    """A pool of one worker, which lives here and answers at once; its own exchange."""

    def __init__(self):
        self.generation = 1
        self.control_bytes = 0
        self.requests = []
        self.lost = None
        self.map = SlotMap(torch.device("cpu"))

    @contextlib.contextmanager
    def turn(self, poll):
        if self.lost == "before the call":
            raise WorkerError("planted")
        yield self

    @property
    def next_number(self):
        return len(self.requests) + 1

    def send(self, request, *, before):
        for extra, fd in before:
            if isinstance(extra, Map):
                self.map.add(extra.slot, os.dup(fd), extra.size_bytes)
            if isinstance(extra, Unmap):
                self.map.drop(extra.slots)
        if self.lost == "in the call":
            raise WorkerError("planted")
        assert request.request == self.next_number
        self.requests.append(request)
        self.control_bytes += 100

    def replies(self, poll, progress):
        request = self.requests[-1]
        return [getattr(self, f"answer_{type(request).__name__}")(request)]

    def answer_Forward(self, request):  # noqa: N802
        x = self.map.fetch(request.arguments)["x"]
        self.map[request.result].view(x.dtype, x.shape).copy_(2 * x)
        name = str(x.dtype).removeprefix("torch.")
        return Done(request.request, 7, name, tuple(x.shape), 0.1, 11, x.nbytes, 0.08, False)


@pytest.fixture
def pool():
    return Pool()


class Remote(RemoteForward):
    """As the host uses it: new workers are noticed before each call."""

    def forward(self, *args, **kwargs):
        self._wire.follow_generation()
        return super().forward(*args, **kwargs)


@pytest.fixture
def remote(pool):
    return Remote(Wire(pool), Totals())


class Pipeline:
    """Counts the calls of a stream."""

    num_calls = 0

    def tree(self, arguments):
        self.num_calls += 1
        return {"call": self.num_calls}


def call(remote, x, patches=None, room=None, pipeline=None, **arguments):
    return remote.forward(
        1,
        {"x": x, **arguments},
        plan=ParallelPlan(1, 1, 1),
        patches=patches,
        out_channels=x.shape[1],
        poll=lambda: None,
        room=room,
        pipeline=pipeline,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_is_what_the_workers_wrote(remote, dtype):
    x = torch.rand(2, 4, 6, 8).to(dtype)
    assert torch.equal(call(remote, x), 2 * x)


def test_an_answer_does_not_change_when_the_next_one_is_written(remote):
    first = call(remote, torch.ones(1, 4, 2, 2))
    call(remote, torch.zeros(1, 4, 2, 2))
    assert torch.equal(first, torch.full((1, 4, 2, 2), 2.0))


def test_only_what_the_workers_need_of_the_options_is_carried(remote, pool):
    options = {"rope_options": {"scale_x": 2.0}, "sigmas": object(), "callbacks": {1: object()}}
    call(remote, torch.ones(1, 4, 2, 2), transformer_options=options, extra=object())
    tree = pool.requests[-1].arguments
    assert set(tree) == {"x", "transformer_options"}
    assert tree["transformer_options"] == {"rope_options": {"scale_x": 2.0}}


def test_an_argument_that_cannot_be_carried_ends_the_call_before_it_is_sent(remote, pool):
    with pytest.raises(UncarriedArgumentError, match=r"^y is a object$"):
        call(remote, torch.ones(1, 4, 2, 2), y=object())
    assert pool.requests == []
    assert torch.equal(call(remote, torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 2.0))


def test_bytes_and_forwards_are_counted(pool):
    totals = Totals()
    remote = Remote(Wire(pool), totals)
    x, context = torch.ones(1, 4, 2, 2), torch.ones(1, 10, 8)
    for _ in range(3):
        call(remote, x.clone(), context=context.clone())
    assert totals.bytes_to_workers == x.nbytes + context.nbytes + 3 * 100
    assert totals.bytes_from_workers == 3 * x.nbytes
    assert totals.bytes_between_ranks == 3 * 11
    assert totals.num_forwards == {0: 7}


def test_a_call_for_which_there_is_no_room_costs_no_workers(remote, pool):
    computes = pool.answer_Forward
    shortages: list[str] = []
    room = Room(3 << 20, shortages.append)
    pool.answer_Forward = lambda request: NoRoom(request.request, True)
    with pytest.raises(CardsFullError, match=r"^Ranks \[0\] have no 3 MiB for a call\.$"):
        call(remote, torch.ones(1, 4, 2, 2), room=room)
    assert [request.working_bytes for request in pool.requests] == [3 << 20] * 2
    assert shortages == ["Ranks [0] have no 3 MiB for a call."], "asked once, and tried once more"
    with pytest.raises(MessageError):  # the pool makes a lost worker of it
        call(remote, torch.ones(1, 4, 2, 2))  # nobody asked for a look
    pool.answer_Forward = computes
    assert torch.equal(call(remote, torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 2.0))


def test_a_call_goes_on_when_comfyui_has_made_room(remote, pool):
    computes = pool.answer_Forward
    pool.answer_Forward = lambda request: NoRoom(request.request, True)
    room = Room(3 << 20, lambda _: setattr(pool, "answer_Forward", computes))
    pipeline = Pipeline()
    out = call(remote, torch.ones(1, 4, 2, 2), room=room, pipeline=pipeline)
    assert torch.equal(out, torch.full((1, 4, 2, 2), 2.0))
    assert [request.pipeline for request in pool.requests] == [{"call": 1}] * 2
    assert pipeline.num_calls == 1, "for PipeFusion it is one call, as exact as it was to be"


def test_new_workers_are_sent_everything_anew(remote, pool):
    x = torch.ones(1, 4, 2, 2)
    call(remote, x)
    pool.map, pool.generation = SlotMap(torch.device("cpu")), 2
    assert torch.equal(call(remote, x), 2 * x)


@pytest.mark.parametrize("lost", ["before the call", "in the call"])
def test_lost_workers_cost_no_file_descriptors(remote, pool, lost):
    pool.lost = lost

    def lose_workers_in_their_first_call():
        with pytest.raises(WorkerError):
            call(remote, torch.ones(1, 4, 2, 2))
        pool.map = SlotMap(torch.device("cpu"))
        pool.generation += 1
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    first = lose_workers_in_their_first_call()
    assert [lose_workers_in_their_first_call() for _ in range(3)] == [first] * 3


def test_conditioning_that_changed_only_in_its_middle_is_noticed_before_the_call(remote, pool):
    first = torch.zeros(1, 4, 64, 64)
    call(remote, first)
    changed = first.clone()
    changed[0, 2, 0, 0] = 5
    assert torch.equal(call(remote, changed), 2 * changed)
    assert len(pool.requests) == 2
