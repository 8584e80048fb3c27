"""Broken messages, by chance and many: decoder and channel raise errors of ours at most."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from functools import partial

from rig.broken_messages import arriving, broken_body, broken_frame
from rig.fuzzing import named, nothing_is_left, outcome_of, seeds
from rig.sample_messages import MESSAGES

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError, MessageError
from comfy_xdit_patch.wire.channel import Channel
from comfy_xdit_patch.wire.messages.codec import checks_of, decode


def test_the_decoder_makes_a_message_of_the_right_types_or_a_message_error() -> None:
    with nothing_is_left():
        for seed in seeds(2000):
            chance = random.Random(seed)
            data = broken_body(chance.choice(MESSAGES), chance)
            with named(seed, data):
                found = outcome_of(partial(decode, data))
                if isinstance(found, Exception):
                    assert isinstance(found, MessageError)
                    assert len(str(found)) < 2000
                    continue
                for name, check in checks_of(type(found)).items():
                    assert check(getattr(found, name)), name


def test_a_channel_gives_what_was_written_and_ends_as_it_ended_at_once() -> None:
    with nothing_is_left(), open(os.devnull) as extra:
        for seed in seeds(300):
            chance = random.Random(seed)
            ours, theirs = socket.socketpair()
            channel = Channel(ours, takes_fds=chance.random() < 0.5)
            data = write_broken_frames(theirs, chance, extra.fileno())
            expected = arriving(data)
            if chance.random() < 0.7:
                theirs.close()
            elif isinstance(expected[-1], ChannelClosedError):
                expected[-1] = DeadlineExceededError("more may follow")
            with named(seed, data):
                for right in expected:
                    deadline_s = 0.002 if isinstance(right, DeadlineExceededError) else 10.0
                    found = outcome_of(partial(channel.receive, deadline_s=deadline_s))
                    if isinstance(right, Exception):
                        assert type(found) is type(right)
                    else:
                        assert repr(found) == repr(right)  # There may be NaN in it.
            channel.close()
            theirs.close()


def write_broken_frames(end: socket.socket, chance: random.Random, extra: int) -> bytes:
    """Write what fits of three frames, some with descriptors that nobody asked for; return it."""
    data = b"".join(broken_frame(chance.choice(MESSAGES), chance) for _ in range(3))
    if chance.random() < 0.3:
        data = data[: chance.randrange(len(data))]
    end.setblocking(False)
    num_sent = 0
    with contextlib.suppress(BlockingIOError):
        if chance.random() < 0.3 and data:
            fds = [extra] * chance.choice((1, 3, 100))
            num_sent = socket.send_fds(end, [data[:7]], fds)
        num_sent += end.send(data[num_sent:])
    return data[:num_sent]
