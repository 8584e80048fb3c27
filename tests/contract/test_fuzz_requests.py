"""What a broken host says ends the worker with a report; it neither hangs nor goes on."""

from __future__ import annotations

import contextlib
import datetime
import socket
from typing import Any, NoReturn, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig.broken_messages import arriving, broken_frames, nothing_is_left, tried, values_of

from comfy_xdit_patch.errors import ChannelClosedError
from comfy_xdit_patch.wire.channel import Channel, frame_of
from comfy_xdit_patch.wire.messages import replies, requests
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.slots import SlotMap
from comfy_xdit_patch.worker import process
from comfy_xdit_patch.worker.engine import Engine
from comfy_xdit_patch.worker.process import Heartbeat
from comfy_xdit_patch.worker.ranks.groups import Groups

STARTS = values_of(requests.Start)


class LeftError(BaseException):
    """The worker left with a code."""


class JoinedWorker(process.Worker):
    """A worker that is past its start, alone in its world, without ComfyUI."""

    def _join(self, start: requests.Start) -> Any:
        slots = SlotMap(torch.device("cpu"))
        timeout = datetime.timedelta(seconds=60)
        groups = Groups(rank=0, world_size=1, device=torch.device("cpu"), step_timeout=timeout)
        # Never started: what it would say in between is not what is looked at here.
        return Engine(groups=groups, slots=slots), slots, groups, Heartbeat(self._channel, int)


def leave(code: int) -> NoReturn:
    raise LeftError(code)


def test_a_broken_request_ends_the_worker_with_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_leave_at_once", leave)
    others = [hint for hint in get_args(Message) if hint is not requests.Start]

    @tried(300)
    @given(
        first=STARTS.map(frame_of) | broken_frames(STARTS),
        second=broken_frames(st.one_of(map(values_of, others))),
    )
    def try_one(first: bytes, second: bytes) -> None:
        code, last, written = served(first, second)
        assert code in (None, 1)
        if code == 1:
            assert isinstance(last, replies.Failed)
        else:
            assert_left_in_peace(arriving(written))

    with nothing_is_left():
        try_one()


def assert_left_in_peace(said: list[Message | Exception]) -> None:
    """It was asked to stop, or its host was gone; there was nothing to report."""
    assert isinstance(said[0], (requests.Start, ChannelClosedError))
    stops = any(isinstance(message, requests.Stop) for message in said)
    assert stops or isinstance(said[-1], ChannelClosedError)


def served(*frames: bytes) -> tuple[int | None, Message | None, bytes]:
    """Serve what a host wrote before it closed.

    Returns:
        The exit code, the last reply, and what was written.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(0.2)
    written = b""
    with contextlib.suppress(TimeoutError):  # 20,000 brackets do not fit at once
        for frame in frames:
            written += frame[: socket.send_fds(ours, [frame], [ours.fileno()])]
    ours.shutdown(socket.SHUT_WR)
    worker = JoinedWorker(rank=0, channel=Channel(theirs), store_fd=-1, mailbox_fd=-1)
    code = None
    try:
        worker.run()
    except LeftError as left:
        code = left.args[0]
    worker._channel.close()
    channel, last = Channel(ours), None
    with contextlib.suppress(ChannelClosedError):
        while message := channel.poll():
            last = message
    channel.close()
    return code, last, written
