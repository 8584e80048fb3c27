"""What a broken worker answers: a result of the right shape, or lost workers. Never more."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig.broken_messages import arriving, broken_frames, nothing_is_left, outcome_of, tried

from comfy_xdit_patch.errors import DeclinedError, WorkerError
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.inheritance import HostState
from comfy_xdit_patch.host.pool.launcher import Worker
from comfy_xdit_patch.host.pool.pool import Pool, PoolState
from comfy_xdit_patch.host.pool.start import Started
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.host.step.controlnets import RemoteControl
from comfy_xdit_patch.host.step.whole_call import RemoteForward
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.settings import read_settings
from comfy_xdit_patch.wire.channel import Channel, frame_of
from comfy_xdit_patch.wire.messages import replies, requests
from comfy_xdit_patch.wire.messages.codec import Message

NUM_RANKS = 2
PLAN = ParallelPlan(ulysses=NUM_RANKS)


class Process:
    """A process that is alive until it is killed."""

    pid = 1

    def __init__(self) -> None:
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9

    def wait(self, timeout: float | None = None) -> int | None:
        return self.code


class Quiet(Worker):
    """A worker without a log."""

    def log_tail(self) -> str:
        return ""


SETTINGS = read_settings({"XDIT_GPUS": "cpu:2", "XDIT_STEP_TIMEOUT": "0.05"})
HOST_STATE = HostState("/", [], [], False, {})
CPU = Device(name="cpu")
NO_LOG = Path("/nowhere/worker.log")
X = torch.ones(2, 4, 16, 8)  # a whole page
Chroma = type("Chroma", (), {"__module__": "comfy.ldm.chroma.model"})
CALL = Call(Chroma(), None, {"x": X}, Run(), poll=lambda: None)
DONE = replies.Done(1, 5, "float32", (2, 4, 16, 8), 0.1, 0, X.nbytes, 0.1, False, True)
CONTROLLED = replies.Controlled(
    1, {"input": [0, 0, None], "output": [1, 2]}, "float32", (2, 12, 16), 0.1, 0
)


class World:
    """A real pool whose workers are sockets on which the replies lie already."""

    def __init__(self, frames: list[bytes]) -> None:
        self.pool = Pool(
            devices=[CPU] * len(frames),
            host_state=HOST_STATE,
            settings=SETTINGS,
            unless_busy=lambda action: action(),
        )
        self.ends: list[socket.socket] = []
        workers = []
        for rank, frame in enumerate(frames):
            ours, theirs = socket.socketpair()
            theirs.settimeout(1)
            with contextlib.suppress(TimeoutError):
                theirs.sendall(frame)
            theirs.shutdown(socket.SHUT_WR)
            self.ends.append(theirs)
            channel = Channel(ours, takes_fds=False)
            worker: Any = Quiet(rank, CPU, Process(), channel, NO_LOG)  # type: ignore[arg-type]
            workers.append(worker)
        self.workers = workers
        timeout_s = SETTINGS.step_timeout_s
        started = Started(tuple(workers), {}, 0.0)
        self.crew = Crew(started, step_timeout_s=timeout_s, lose=self.pool._lose)
        self.pool.crew, self.pool.state = self.crew, PoolState.READY

    def forward(self) -> torch.Tensor:
        return RemoteForward(Totals()).forward(self.crew, 1, CALL, PLAN).out

    def control(self) -> Any:
        return RemoteControl(Totals()).forward(self.crew, 1, CALL, PLAN, lambda: {})

    def close(self) -> None:
        for end in self.ends:
            end.close()
        for worker in self.workers:
            worker.channel.close()
        self.pool.crew = None
        del self.crew


@pytest.mark.parametrize(("reply", "call"), [(DONE, "forward"), (CONTROLLED, "control")])
def test_a_broken_answer_is_a_result_of_the_right_shape_or_loses_the_workers(
    reply: replies.Done | replies.Controlled, call: str
) -> None:
    @tried(250)
    @given(broken=broken_frames(st.just(reply)), ranks=st.sampled_from([[0], [1], [0, 1]]))
    def try_one(broken: bytes, ranks: list[int]) -> None:
        # What all ranks say alike is not right for that.
        world = World([broken if n in ranks else frame_of(reply) for n in range(NUM_RANKS)])
        found = outcome_of(getattr(world, call))
        said = arriving(broken)[0]
        if isinstance(found, Exception):
            assert isinstance(found, (WorkerError, DeclinedError))
            assert repr(said) != repr(reply), "nothing was wrong"
            assert len(str(found)) < 30_000
        else:
            assert isinstance(said, type(reply))
            assert said.request == reply.request
            assert_is_right(found)
        is_lost = isinstance(found, WorkerError)
        assert world.pool.state is (PoolState.BROKEN if is_lost else PoolState.READY)
        world.close()

    with nothing_is_left():
        try_one()


def assert_is_right(found: Any) -> None:
    if isinstance(found, torch.Tensor):
        assert found.shape == X.shape
        return
    residuals = [item for part in found.values() for item in part if item is not None]
    assert all(residual.shape[0] == X.shape[0] for residual in residuals)


WRONG = [
    dataclasses.replace(DONE, dtype="os"),
    dataclasses.replace(DONE, dtype="float64"),  # twice the size of the slot
    dataclasses.replace(DONE, dtype="int32"),
    dataclasses.replace(DONE, shape=(2, 4, 16, 9)),
    dataclasses.replace(DONE, shape=(2, 4, 128)),
    dataclasses.replace(DONE, shape=(2, 4, -16, -8)),
    dataclasses.replace(DONE, shape=(1 << 62, 4, 16, 8)),
    dataclasses.replace(DONE, shape=()),
    replies.Ran(1, 1, 0.1, 0, 0.1),
    replies.Unloaded(1),
    requests.Forward(1, 1, [1, 1, 1, 2, 1], [], {}, 0),
    replies.Declined(1, "only this one"),
    replies.NoRoom(1, True),  # nobody asked
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)], ids=str)
def test_a_well_formed_answer_that_cannot_be_right_loses_the_workers(
    wrong: Message, ranks: tuple[int, ...]
) -> None:
    if isinstance(wrong, replies.Declined) and len(ranks) == 2:
        pytest.skip("all ranks may decline")
    frames = [frame_of(wrong if rank in ranks else DONE) for rank in range(NUM_RANKS)]
    world = World(frames)
    with pytest.raises(WorkerError):
        world.forward()
    assert world.pool.state is PoolState.BROKEN
    assert all(worker.process.poll() == -9 for worker in world.workers)
    world.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": {"input": ["0"]}},
        {"layout": [0, 1]},
        {"shape": (3, 12, 16)},
        {"shape": ()},
        {"shape": (2, 1 << 40, 1 << 40)},
        {"dtype": "manual_seed"},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_residuals_that_cannot_be_right_lose_the_workers(wrong: dict[str, Any]) -> None:
    world = World([frame_of(dataclasses.replace(CONTROLLED, **wrong))] * NUM_RANKS)
    with pytest.raises(WorkerError):
        world.control()
    world.close()
