"""Frames, file descriptors, deadlines and the other end's death, over real sockets."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time

import pytest

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError, MessageError
from comfy_xdit_patch.wire.channel import MAX_MESSAGE_BYTES, Channel, wait_readable
from comfy_xdit_patch.wire.messages.codec import encode
from comfy_xdit_patch.wire.messages.replies import Failed
from comfy_xdit_patch.wire.messages.requests import Map, Stop, Unload, Unmap


@pytest.fixture
def pair():
    """Two channels that are connected with each other."""
    ends = [Channel(end) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def raw():
    """Return a channel and the plain socket at its other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def frame(message):
    body = encode(message)
    return struct.pack("!I", len(body)) + body


def test_messages_arrive_in_order_in_both_directions(pair):
    here, there = pair
    for number in range(100):
        here.send(Unload(number), deadline_s=1)
    there.send(Stop(), deadline_s=1)
    received = [there.receive(deadline_s=1) for _ in range(100)]
    assert received == [Unload(n) for n in range(100)]
    assert here.receive(deadline_s=1) == Stop()


def test_send_returns_the_bytes_on_the_wire(pair):
    assert pair[0].send(Unload(7), deadline_s=1) == len(frame(Unload(7)))


def test_a_channel_can_take_over_an_inherited_descriptor():
    ours, theirs = socket.socketpair()
    channel, other = Channel.from_fd(ours.detach(), peer_pid=os.getpid()), Channel(theirs)
    channel.send(Stop(), deadline_s=1)
    assert other.receive(deadline_s=1) == Stop()
    channel.close()
    other.close()


def test_a_message_larger_than_the_sockets_buffers_arrives_whole(pair):
    here, there = pair
    large = Failed(1, "forward", "x" * 5_000_000, "")
    sender = threading.Thread(target=here.send, args=(large,), kwargs={"deadline_s": 10})
    sender.start()
    assert there.receive(deadline_s=10) == large
    sender.join()


def test_a_frame_that_arrives_byte_by_byte_is_one_message(raw):
    channel, theirs = raw
    data = frame(Unmap([1, 2, 3]))
    for position in range(len(data)):
        assert channel.poll() is None
        theirs.send(data[position : position + 1])
    assert channel.poll() == Unmap([1, 2, 3])
    assert channel.poll() is None


def test_frames_that_arrive_together_are_several_messages(raw):
    channel, theirs = raw
    theirs.send(frame(Unload(1)) + frame(Unload(2)) + frame(Unload(3))[:-1])
    assert [channel.poll(), channel.poll(), channel.poll()] == [Unload(1), Unload(2), None]


@pytest.mark.parametrize("begun", [b"", frame(Stop())[:-1]])
def test_receive_gives_up_at_its_deadline(raw, begun):
    channel, theirs = raw
    theirs.send(begun)
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="receive"):
        channel.receive(deadline_s=0.1)
    assert 0.1 <= time.monotonic() - start < 2


def test_a_trickle_of_bytes_does_not_put_the_deadline_off(raw):
    channel, theirs = raw
    stop = threading.Event()

    def trickle():
        theirs.send(struct.pack("!I", 10_000))
        while not stop.wait(0.01):
            theirs.send(b" ")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        start = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            channel.receive(deadline_s=0.15)
        assert time.monotonic() - start < 2
    finally:
        stop.set()
        thread.join()


def test_send_gives_up_at_its_deadline_when_nobody_reads(pair):
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="send"):
        pair[0].send(Failed(1, "forward", "x" * 5_000_000, ""), deadline_s=0.1)
    assert 0.1 <= time.monotonic() - start < 2


def test_what_the_other_end_sent_before_it_ended_is_still_read(pair):
    here, there = pair
    there.send(Unload(1), deadline_s=1)
    there.send(Unload(2), deadline_s=1)
    there.close()
    assert here.receive(deadline_s=1) == Unload(1)
    assert here.poll() == Unload(2)
    with pytest.raises(ChannelClosedError):
        here.poll()
    with pytest.raises(ChannelClosedError):
        here.receive(deadline_s=1)


def test_an_end_that_closes_with_unread_messages_is_gone_and_not_something_else(pair):
    here, there = pair
    here.send(Stop(), deadline_s=1)
    there.close()
    with pytest.raises(ChannelClosedError):
        here.receive(deadline_s=1)


def test_a_frame_cut_by_the_other_ends_death_is_no_message(raw):
    channel, theirs = raw
    theirs.send(frame(Unload(1))[:-3])
    theirs.close()
    with pytest.raises(ChannelClosedError):
        channel.receive(deadline_s=1)


def test_sending_to_an_end_that_is_gone_says_so(pair):
    here, there = pair
    there.close()
    with pytest.raises(ChannelClosedError, match="The other process is gone"):
        here.send(Stop(), deadline_s=1)


def test_bytes_that_are_no_message_are_an_error(raw):
    channel, theirs = raw
    theirs.send(struct.pack("!I", 7) + b"garbage")
    with pytest.raises(MessageError):
        channel.receive(deadline_s=1)


def test_an_absurd_length_is_an_error_before_anything_is_read(raw):
    channel, theirs = raw
    theirs.send(struct.pack("!I", MAX_MESSAGE_BYTES + 1))
    with pytest.raises(MessageError, match=rf"the limit is {MAX_MESSAGE_BYTES}"):
        channel.receive(deadline_s=1)


def test_file_descriptors_arrive_with_their_messages_in_order(pair):
    here, there = pair
    for number, content in enumerate([b"first", b"second"]):
        fd = os.memfd_create("test")
        os.write(fd, content)
        here.send(Map(number, len(content)), deadline_s=1, fd=fd)
        os.close(fd)
        here.send(Unload(number), deadline_s=1)
    for number, content in enumerate([b"first", b"second"]):
        assert there.receive(deadline_s=1) == Map(number, len(content))
        fd = there.take_fd()
        assert os.pread(fd, 100, 0) == content
        os.close(fd)
        assert there.receive(deadline_s=1) == Unload(number)


def test_a_file_descriptor_rides_on_a_message_that_is_sent_in_pieces(pair):
    here, there = pair
    fd = os.memfd_create("test")
    large = Unmap(list(range(60_000)))
    sender = threading.Thread(target=here.send, args=(large,), kwargs={"deadline_s": 10, "fd": fd})
    sender.start()
    assert there.receive(deadline_s=10) == large
    sender.join()
    received = there.take_fd()
    assert os.fstat(received).st_ino == os.fstat(fd).st_ino
    with pytest.raises(MessageError):
        there.take_fd()
    os.close(received)
    os.close(fd)


def test_a_missing_file_descriptor_is_an_error(pair):
    here, there = pair
    here.send(Map(0, 4096), deadline_s=1)
    there.receive(deadline_s=1)
    with pytest.raises(MessageError, match="file descriptor"):
        there.take_fd()


def test_closing_a_channel_closes_the_descriptors_that_nobody_took(pair):
    here, there = pair
    read_end, write_end = os.pipe()
    here.send(Map(0, 1), deadline_s=1, fd=write_end)
    os.close(write_end)
    there.receive(deadline_s=1)
    there.close()
    assert os.read(read_end, 1) == b""  # no writer is left
    os.close(read_end)


def test_wait_readable_names_the_channels_with_something_to_read(pair):
    here, there = pair
    assert wait_readable(pair, timeout_s=0) == []
    there.send(Stop(), deadline_s=1)
    assert wait_readable(pair, timeout_s=1) == [here]
    here.receive(deadline_s=1)
    there.close()
    assert wait_readable([here], timeout_s=1) == [here]  # its end can be read


def test_wait_readable_waits_no_longer_than_told(pair):
    start = time.monotonic()
    assert wait_readable(pair, timeout_s=0.1) == []
    assert wait_readable(pair, timeout_s=-1) == []
    assert 0.09 <= time.monotonic() - start < 2


def test_a_message_that_was_read_together_with_another_one_is_not_waited_for(raw):
    """A worker's progress and its reply, a millisecond apart, once cost a whole step timeout."""
    channel, other = raw
    other.sendall(frame(Unload(1)) + frame(Unload(2)))
    assert wait_readable([channel], timeout_s=1) == [channel]
    assert channel.poll() == Unload(1)
    assert wait_readable([channel], timeout_s=0) == [channel]
    assert channel.poll() == Unload(2)
    other.sendall(frame(Unload(3))[:5])
    assert wait_readable([channel], timeout_s=1) == [channel]
    assert channel.poll() is None
    assert wait_readable([channel], timeout_s=0) == [], "half a message is none"
