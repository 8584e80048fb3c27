"""One call on the workers, against one worker in the same process that doubles what it gets."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch

from comfy_xdit_patch.errors import CardsFullError, WorkerError
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pool.crew import Crew, Room
from comfy_xdit_patch.host.pool.start import Started
from comfy_xdit_patch.host.reading.node_patches import CarriedPatches
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.whole_call import RemoteForward
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.replies import Done, NoRoom
from comfy_xdit_patch.wire.messages.requests import Map, Unmap
from comfy_xdit_patch.wire.slots import SlotMap
from comfy_xdit_patch.wire.values import UncarriedValueError


class Exchange:
    """With a worker that lives here and answers at once."""

    def __init__(self):
        self.bytes_sent = 0
        self.requests = []
        self.lost = None
        self.is_launch_bound = self.is_replayed = False
        self.is_finite = True
        self.uncaptured = ""
        self.is_late = False
        """As a GPU, whose times come with the next answer."""
        self.map = SlotMap(torch.device("cpu"))

    def settle(self, poll):
        if self.lost == "before the call":
            raise WorkerError("planted")

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
        self.bytes_sent += 100

    def replies(self, poll, progress):
        request = self.requests[-1]
        return [getattr(self, f"answer_{type(request).__name__}")(request)]

    def answer_Forward(self, request):  # noqa: N802
        x = self.map.fetch(request.arguments)["x"]
        self.map[request.result].view(x.dtype, x.shape).copy_(2 * x)
        name = str(x.dtype).removeprefix("torch.")
        seconds = 0.1, 11, x.nbytes, 0.08
        flags = self.is_launch_bound, self.is_finite
        done = Done(request.request, 7, name, tuple(x.shape), *seconds, *flags)
        done = replace(done, timed=request.request - self.is_late)
        return replace(done, is_replayed=self.is_replayed, uncaptured=self.uncaptured)


@pytest.fixture
def remote():
    return Remote()


class Remote:
    """``RemoteForward`` with the crew of now."""

    captures = False

    def __init__(self):
        self.totals = Totals()
        self.have_new_workers()

    def have_new_workers(self):
        self.losses = []
        self.crew = Crew(
            Started((None,), {}, 0.0),
            step_timeout_s=1.0,
            lose=lambda _, why: self.losses.append(why),
        )
        self.exchange = self.crew._exchange = Exchange()

    @property
    def requests(self):
        return self.exchange.requests

    def forward(self, *args, **kwargs):
        forward = RemoteForward(self.totals, captures=self.captures)
        return forward.forward(self.crew, *args, **kwargs).out


class Pipeline:
    """Counts the calls of a stream."""

    num_calls = 0

    def tree(self, arguments):
        self.num_calls += 1
        return {"call": self.num_calls}


class Chroma:
    """Writes as many channels as it reads."""

    __module__ = "comfy.ldm.chroma.model"
    params = None


def call(remote, x, patches=None, room=None, pipeline=None, **arguments):
    made = Call(
        Chroma(),
        None,
        {"x": x, **arguments},
        Run(),
        CarriedPatches(tree=patches),
        poll=lambda: None,
    )
    return remote.forward(1, made, ParallelPlan(), room=room, pipeline=pipeline)


def test_what_a_gpu_says_with_the_next_answer_is_of_the_call_before(remote):
    remote.exchange.is_late = True
    x, other = torch.rand(2, 4, 6, 8), torch.rand(2, 4, 8, 8)
    for is_launch_bound, of_call in ((False, x), (True, x), (True, x), (True, other)):
        remote.exchange.is_launch_bound = is_launch_bound
        call(remote, of_call)
    call(remote, other)
    call(remote, x)
    assert [request.overlaps for request in remote.requests[-2:]] == [True, False]


def test_ranks_whose_launches_set_the_pace_again_and_again_overlap_nothing_from_then_on(remote):
    x = torch.rand(2, 4, 6, 8)
    for is_launch_bound in (True, True, False, True, True, True, False, False):
        remote.exchange.is_launch_bound = is_launch_bound
        call(remote, x)
    assert [request.overlaps for request in remote.requests] == [True] * 6 + [False] * 2
    call(remote, torch.rand(2, 4, 8, 8))
    assert remote.requests[-1].overlaps, "a call of another size"
    remote.have_new_workers()
    call(remote, x)
    assert remote.requests[-1].overlaps


@pytest.mark.parametrize(
    ("counts", "is_replayed", "uncaptured"),
    [(False, False, ""), (True, True, ""), (True, False, "why")],
)
def test_launches_of_calls_that_are_a_graph_soon_count_for_nothing(
    remote, counts, is_replayed, uncaptured
):
    x = torch.rand(2, 4, 6, 8)
    remote.captures = remote.exchange.is_launch_bound = True
    remote.exchange.is_replayed, remote.exchange.uncaptured = is_replayed, uncaptured
    for _ in range(4):
        call(remote, x)
    assert all(request.captures for request in remote.requests)
    assert remote.requests[-1].overlaps != counts


def test_launches_of_calls_that_were_no_graphs_say_nothing_of_those_that_are(remote):
    x = torch.rand(2, 4, 6, 8)
    remote.exchange.is_launch_bound = True
    for captures in (False, False, False, True, True):
        remote.captures = captures
        call(remote, x)
    assert [request.overlaps for request in remote.requests] == [True] * 5
    remote.captures = False
    call(remote, x)
    assert not remote.requests[-1].overlaps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_is_what_the_workers_wrote(remote, dtype):
    x = torch.rand(2, 4, 6, 8).to(dtype)
    assert torch.equal(call(remote, x), 2 * x)


def test_an_answer_says_whether_all_that_the_workers_wrote_is_finite(remote):
    remote.exchange.is_finite = False
    made = Call(Chroma(), None, {"x": torch.ones(1, 4, 2, 2)}, Run(), poll=lambda: None)
    forward = RemoteForward(remote.totals).forward
    assert not forward(remote.crew, 1, made, ParallelPlan()).is_finite
    remote.exchange.is_finite = True
    assert forward(remote.crew, 1, made, ParallelPlan()).is_finite


def test_an_answer_does_not_change_when_the_next_one_is_written(remote):
    first = call(remote, torch.ones(1, 4, 2, 2))
    call(remote, torch.zeros(1, 4, 2, 2))
    assert torch.equal(first, torch.full((1, 4, 2, 2), 2.0))


def test_only_what_the_workers_need_of_the_options_is_carried(remote):
    options = {"rope_options": {"scale_x": 2.0}, "sigmas": object(), "callbacks": {1: object()}}
    call(remote, torch.ones(1, 4, 2, 2), transformer_options=options, extra=object())
    tree = remote.requests[-1].arguments
    assert set(tree) == {"x", "transformer_options"}
    assert tree["transformer_options"] == {"rope_options": {"scale_x": 2.0}}


def test_an_argument_that_cannot_be_carried_ends_the_call_before_it_is_sent(remote):
    with pytest.raises(UncarriedValueError, match=r"^y is a object$"):
        call(remote, torch.ones(1, 4, 2, 2), y=object())
    assert remote.requests == []
    assert torch.equal(call(remote, torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 2.0))


def test_bytes_and_forwards_are_counted(remote):
    totals = remote.totals
    x, context = torch.ones(1, 4, 2, 2), torch.ones(1, 10, 8)
    for _ in range(3):
        call(remote, x.clone(), context=context.clone())
    assert totals.bytes_to_workers == x.nbytes + context.nbytes + 3 * 100
    assert totals.bytes_from_workers == 3 * x.nbytes
    assert totals.bytes_between_ranks == 3 * 11
    assert totals.of_rank(0, 0.0, None)["forwards"] == 7


def test_a_call_for_which_there_is_no_room_costs_no_workers(remote):
    computes = remote.exchange.answer_Forward
    shortages: list[str] = []
    room = Room(3 << 20, shortages.append)
    remote.exchange.answer_Forward = lambda request: NoRoom(request.request, True)
    with pytest.raises(CardsFullError, match=r"^Ranks \[0\] have no 3 MiB for a call\.$"):
        call(remote, torch.ones(1, 4, 2, 2), room=room)
    assert [request.working_bytes for request in remote.requests] == [3 << 20] * 2
    assert shortages == ["Ranks [0] have no 3 MiB for a call."], "asked once, and tried once more"
    assert remote.losses == []
    with pytest.raises(WorkerError, match=r"^Rank 0 answered Forward with NoRoom\."):
        call(remote, torch.ones(1, 4, 2, 2))  # nobody asked for a look
    assert len(remote.losses) == 1
    remote.exchange.answer_Forward = computes
    assert torch.equal(call(remote, torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 2.0))


def test_a_call_goes_on_when_comfyui_has_made_room(remote):
    computes = remote.exchange.answer_Forward
    remote.exchange.answer_Forward = lambda request: NoRoom(request.request, True)
    room = Room(3 << 20, lambda _: setattr(remote.exchange, "answer_Forward", computes))
    pipeline = Pipeline()
    out = call(remote, torch.ones(1, 4, 2, 2), room=room, pipeline=pipeline)
    assert torch.equal(out, torch.full((1, 4, 2, 2), 2.0))
    assert [request.pipeline for request in remote.requests] == [{"call": 1}] * 2
    assert pipeline.num_calls == 1, "for PipeFusion it is one call, as exact as it was to be"


def test_new_workers_are_sent_everything_anew(remote):
    x = torch.ones(1, 4, 2, 2)
    call(remote, x)
    remote.have_new_workers()
    assert torch.equal(call(remote, x), 2 * x)


@pytest.mark.parametrize("lost", ["before the call", "in the call"])
def test_lost_workers_cost_no_file_descriptors(remote, lost):
    def lose_workers_in_their_first_call():
        remote.have_new_workers()
        remote.crew.packs.place([torch.rand(4)])  # never sent
        remote.exchange.lost = lost
        with pytest.raises(WorkerError):
            call(remote, torch.ones(1, 4, 2, 2))
        remote.have_new_workers()
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    first = lose_workers_in_their_first_call()
    assert [lose_workers_in_their_first_call() for _ in range(3)] == [first] * 3


def test_shared_memory_ends_with_the_last_reference_to_a_crew(remote):
    """A model without a file is gigabytes of it, which wait for no garbage collector."""
    gc.disable()
    try:
        call(remote, torch.ones(1, 4, 2, 2))
        slots = weakref.ref(remote.crew.slots)
        remote.have_new_workers()
        assert slots() is None
    finally:
        gc.enable()


def test_conditioning_that_changed_only_in_its_middle_is_noticed_before_the_call(remote):
    first = torch.zeros(1, 4, 64, 64)
    call(remote, first)
    changed = first.clone()
    changed[0, 2, 0, 0] = 5
    assert torch.equal(call(remote, changed), 2 * changed)
    assert len(remote.requests) == 2
