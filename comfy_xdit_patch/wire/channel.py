"""Framed messages over a connected Unix socket, every wait with a deadline.

Runs in: host and worker.

The two ends are a socket pair that the worker inherits: there is no address to connect to, so
nobody else can. A frame is a four byte length and one message; a file descriptor may ride along.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError, MessageError
from comfy_xdit_patch.wire.messages.codec import Message, decode, encode

MAX_MESSAGE_BYTES = 16 << 20
_LENGTH = struct.Struct("!I")
_PEER = struct.Struct("3i")
"""``struct ucred``: process, user, group."""


class Channel:
    """One end of the control connection between the host and one worker."""

    def __init__(self, connection: socket.socket, *, takes_fds: bool = True) -> None:
        """Take over a connected socket.

        Args:
            takes_fds: keep file descriptors that come. The host takes none: it runs inside of
                ComfyUI, and a worker could use up all that the process may have.
        """
        self._takes_fds = takes_fds
        self._socket = connection
        self._socket.setblocking(False)
        self._sending = threading.Lock()
        self._received = bytearray()
        self._fds: list[int] = []

    @classmethod
    def from_fd(cls, fd: int, *, peer_pid: int) -> Channel:
        """Take over an inherited socket, whose pair that process of the same user has made.

        Raises:
            ChannelClosedError: somebody else made it. Nothing was read.
        """
        connection = socket.socket(fileno=fd)
        made_by = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, _ = _PEER.unpack(made_by)
        if (pid, uid) != (peer_pid, os.geteuid()):
            raise ChannelClosedError(
                f"The channel belongs to process {pid} of user {uid}, and not to process "
                f"{peer_pid} of user {os.geteuid()}."
            )
        return cls(connection)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, *, deadline_s: float, fd: int | None = None) -> int:
        """Send one message, with a file descriptor beside it or not; return its bytes."""
        return self.send_frame(frame_of(message), deadline_s=deadline_s, fd=fd)

    def send_frame(self, data: bytes, *, deadline_s: float, fd: int | None = None) -> int:
        """Send a message that is encoded already; several channels may be given the same.

        Threads may send at the same time.

        Raises:
            ChannelClosedError: the other end is gone.
            DeadlineExceededError: the other end does not read.
        """
        frame = memoryview(data)
        end = time.monotonic() + deadline_s
        sent = 0
        with self._sending:
            while sent < len(frame):
                try:
                    if fd is None:
                        sent += self._socket.send(frame[sent:])
                    else:
                        sent += socket.send_fds(self._socket, [frame[sent:]], [fd])
                        fd = None
                except BlockingIOError:
                    self._wait(select.POLLOUT, end, "send")
                except OSError as error:
                    raise ChannelClosedError(f"The other process is gone ({error}).") from None
        return len(frame)

    def receive(self, *, deadline_s: float) -> Message:
        """Return the next message.

        Raises:
            ChannelClosedError: the other end is gone and everything it sent has been read.
            DeadlineExceededError: nothing came in time.
            MessageError: something came that is not a message.
        """
        end = time.monotonic() + deadline_s
        while True:
            message = self._next_message()
            if message is not None:
                return message
            self._wait(select.POLLIN, end, "receive")
            with contextlib.suppress(BlockingIOError):
                self._fill()

    def poll(self) -> Message | None:
        """Return the next message if it is here already. Same errors as ``receive``."""
        message = self._next_message()
        while message is None:
            try:
                self._fill()
            except BlockingIOError:
                return None
            message = self._next_message()
        return message

    def take_fd(self) -> int:
        """Return the file descriptor that came with the message received last."""
        if not self._fds:
            raise MessageError("A message should have brought a file descriptor and did not.")
        return self._fds.pop(0)

    def close(self) -> None:
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    @property
    def has_message(self) -> bool:
        """Whether a whole message was read from the socket, and not taken yet."""
        return self._end_of_message() is not None

    def _end_of_message(self) -> int | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_MESSAGE_BYTES:
            raise MessageError(f"A message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}.")
        end: int = _LENGTH.size + length
        return end if len(self._received) >= end else None

    def _next_message(self) -> Message | None:
        end = self._end_of_message()
        if end is None:
            return None
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return decode(body)

    def _fill(self) -> None:
        try:
            if self._takes_fds:
                data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 8)
                self._fds.extend(fds)
            else:  # The kernel closes what comes along.
                data = self._socket.recv(1 << 16)
        except ConnectionError as error:
            raise ChannelClosedError(f"The other process is gone ({error}).") from None
        if not data:
            raise ChannelClosedError("The other process closed the channel.")
        self._received += data

    def _wait(self, event: int, end: float, what: str) -> None:
        poller = select.poll()
        poller.register(self._socket, event)
        remaining = end - time.monotonic()
        if remaining <= 0 or not poller.poll(max(remaining * 1000, 1)):
            raise DeadlineExceededError(f"No progress in {what} before the deadline.")


def frame_of(message: Message) -> bytes:
    """Encode a message as it travels."""
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


def wait_readable(channels: Iterable[Channel], *, timeout_s: float) -> list[Channel]:
    """Return the channels that can be read now, waiting at most ``timeout_s`` for the first.

    Two messages may come in one read: the second is no event of the socket any more.
    """
    channels = list(channels)
    read_already = [channel for channel in channels if channel.has_message]
    if read_already:
        return read_already
    by_fd = {channel.fileno(): channel for channel in channels}
    poller = select.poll()
    for fd in by_fd:
        poller.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _ in poller.poll(max(timeout_s, 0) * 1000)]
