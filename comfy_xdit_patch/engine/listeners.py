"""Let nobody connect to this rank any more, once all ranks have.

Runs in: worker process.

Gloo listens on a port of the loopback interface for each process group, for as long as the group
lives, and asks nobody who they are. Measured (torch 2.11): every connection costs the rank a file
descriptor, also after it was closed, and 20,000 of them ended it. Gloo connects all ranks while a
group is made, so what comes later is a stranger.

The sockets are gloo's own and stay as they are; a filter of the kernel drops what is sent to them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import stat
import struct

log = logging.getLogger(__name__)

SO_ATTACH_FILTER = 26  # Python does not name it.
_RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
"""A program for the kernel's packet filter (BPF_RET | BPF_K): of each packet, keep 0 bytes."""


def refuse_strangers() -> None:
    """Drop what is sent to any internet socket on which this process listens."""
    program = ctypes.create_string_buffer(_RETURN_NOTHING, len(_RETURN_NOTHING))
    packet_filter = struct.pack("HP", 1, ctypes.addressof(program))
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue  # The descriptor of the listing above, or a thread has just closed it.
        with connection:
            if _listens(connection):
                try:
                    connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, packet_filter)
                except OSError as error:
                    log.warning("others on this machine can connect to this rank (%s)", error)


def _listens(connection: socket.socket) -> bool:
    is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
    return is_internet and bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
