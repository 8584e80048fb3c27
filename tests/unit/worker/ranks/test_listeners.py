"""A rank's listening sockets, among whatever else it has open."""

from __future__ import annotations

import os
import socket

import pytest

from comfy_xdit_patch.worker.ranks.groups import refuse_strangers


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_nothing_is_left_open_whatever_is_open() -> None:
    memory = os.memfd_create("slot")
    ends = os.pipe()
    with socket.socket() as listening, socket.socket(socket.AF_UNIX):
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        before = open_fds()
        refuse_strangers()
        assert open_fds() == before
    for fd in (memory, *ends):
        os.close(fd)


def test_a_stranger_is_not_heard_and_a_connection_made_before_is() -> None:
    with socket.socket() as listening, socket.socket() as ours, socket.socket() as theirs:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        ours.connect(listening.getsockname())
        here, _ = listening.accept()
        refuse_strangers()
        with here:
            ours.sendall(b"on time")
            assert here.recv(16) == b"on time"
        theirs.settimeout(0.3)
        with pytest.raises(TimeoutError):
            theirs.connect(listening.getsockname())
