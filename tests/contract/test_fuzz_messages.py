"""Broken messages, by chance and many: decoder and channel raise errors of ours at most."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from functools import partial

from hypothesis import given
from hypothesis import strategies as st
from rig.broken_messages import (
    arriving,
    broken_bodies,
    broken_frames,
    nothing_is_left,
    outcome_of,
    tried,
    values_of,
)

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError, MessageError
from comfy_xdit_patch.wire.channel import Channel
from comfy_xdit_patch.wire.messages.codec import Message, checks_of, decode

MESSAGES = values_of(Message)


def test_the_decoder_makes_a_message_of_the_right_types_or_a_message_error() -> None:
    kinds: Counter[bool] = Counter()

    @tried(1500)
    @given(data=broken_bodies(MESSAGES))
    def try_one(data: bytes) -> None:
        found = outcome_of(partial(decode, data))
        kinds[isinstance(found, Exception)] += 1
        if isinstance(found, Exception):
            assert isinstance(found, MessageError)
            assert len(str(found)) < 2000
            return
        for name, check in checks_of(type(found)).items():
            assert check(getattr(found, name)), name

    with nothing_is_left():
        try_one()
    assert min(kinds.values()) > 100, kinds
    assert len(kinds) == 2, "some are broken, some are not"


def test_a_channel_gives_what_was_written_and_ends_as_it_ended_at_once() -> None:
    @tried(300)
    @given(
        frames=st.lists(broken_frames(MESSAGES), min_size=3, max_size=3),
        cut=st.none() | st.floats(0, 1, exclude_max=True),
        num_extra=st.sampled_from([0, 0, 0, 1, 3, 100]),
        takes_fds=st.booleans(),
        closes=st.booleans(),
    )
    def try_one(
        frames: list[bytes], cut: float | None, num_extra: int, takes_fds: bool, closes: bool
    ) -> None:
        ours, theirs = socket.socketpair()
        channel = Channel(ours, takes_fds=takes_fds)
        whole = b"".join(frames)
        part = whole if cut is None else whole[: int(cut * len(whole))]
        expected = arriving(write(theirs, part, [extra.fileno()] * num_extra))
        if closes:
            theirs.close()
        elif isinstance(expected[-1], ChannelClosedError):
            expected[-1] = DeadlineExceededError("more may follow")
        for right in expected:
            deadline_s = 0.002 if isinstance(right, DeadlineExceededError) else 10.0
            found = outcome_of(partial(channel.receive, deadline_s=deadline_s))
            if isinstance(right, Exception):
                assert type(found) is type(right)
            else:
                assert repr(found) == repr(right)  # There may be NaN in it.
        channel.close()
        theirs.close()

    with nothing_is_left(), open(os.devnull) as extra:
        try_one()


def write(end: socket.socket, data: bytes, fds: list[int]) -> bytes:
    """Write what fits, with descriptors that nobody asked for; return what was written."""
    end.setblocking(False)
    num_sent = 0
    with contextlib.suppress(BlockingIOError):
        if fds and data:
            num_sent = socket.send_fds(end, [data[:7]], fds)
        num_sent += end.send(data[num_sent:])
    return data[:num_sent]
