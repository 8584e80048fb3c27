"""Broken messages, by chance and many: decoder and channel raise errors of ours at most."""

from __future__ import annotations

import contextlib
import random
import socket

from rig.broken_messages import broken_body, broken_frame
from rig.fuzzing import TIMES, named, nothing_is_left, outcome_of, seeds
from rig.sample_messages import MESSAGES

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError, MessageError
from comfy_xdit_patch.transport.channel import Channel
from comfy_xdit_patch.transport.fields import checks_of
from comfy_xdit_patch.transport.messages import Message, decode


def test_the_decoder_makes_a_message_of_the_right_types_or_a_message_error() -> None:
    num_messages = num_errors = 0
    with nothing_is_left():
        for seed in seeds(2000):
            chance = random.Random(seed)
            data = broken_body(chance.choice(MESSAGES), chance)
            with named(seed, data):
                found = outcome_of(lambda data=data: decode(data))  # type: ignore[misc]
                if isinstance(found, Exception):
                    assert isinstance(found, MessageError)
                    assert len(str(found)) < 2000
                    num_errors += 1
                    continue
                for name, check in checks_of(type(found)).items():
                    assert check(getattr(found, name)), name
                num_messages += 1
    # Both happen often, or this tries nothing.
    assert num_messages > 200 * TIMES
    assert num_errors > 200 * TIMES


def test_a_channel_gives_messages_or_an_error_of_ours_and_never_waits_past_its_deadline() -> None:
    ended: dict[type[object], int] = dict.fromkeys(
        (ChannelClosedError, DeadlineExceededError, MessageError), 0
    )
    with nothing_is_left():
        for seed in seeds(300):
            chance = random.Random(seed)
            ours, theirs = socket.socketpair()
            channel = Channel(ours, takes_fds=chance.random() < 0.5)
            data = write_broken_frames(theirs, chance)
            if chance.random() < 0.7:
                theirs.close()
            with named(seed, data):
                found: Message | Exception | None = None
                while not isinstance(found, Exception):
                    found = outcome_of(lambda: channel.receive(deadline_s=0.002))  # noqa: B023
                ended[type(found)] += 1
            channel.close()
            theirs.close()
    assert min(ended.values()) > 10 * TIMES, ended


def write_broken_frames(end: socket.socket, chance: random.Random) -> bytes:
    """Write what fits of three frames, some with descriptors that nobody asked for."""
    data = b"".join(broken_frame(chance.choice(MESSAGES), chance) for _ in range(3))
    if chance.random() < 0.3:
        data = data[: chance.randrange(len(data))]
    end.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        rest = data
        if chance.random() < 0.3 and data:
            socket.send_fds(end, [data[:7]], [end.fileno()] * chance.choice((1, 3, 100)))
            rest = data[7:]
        end.send(rest)
    return data
