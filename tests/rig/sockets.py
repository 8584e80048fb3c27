"""List the internet sockets of a process, as the kernel knows them (C++ libraries' too).

Runs in: the rig's environment (standard library only; Linux).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

TABLES = ("tcp", "tcp6", "udp", "udp6")
LISTEN = "0A"
WORD_BYTES = 4  # /proc prints addresses as words in the machine's byte order


@dataclass(frozen=True)
class InternetSocket:
    """One socket; ``remote`` is None while it is not connected."""

    table: str
    local: str
    port: int
    remote: str | None
    is_listening: bool

    @property
    def is_loopback(self) -> bool:
        """Whether both ends are on this machine's loopback interface."""
        ends = [self.local, *([self.remote] if self.remote else [])]
        return all(_is_loopback(end) for end in ends)


def internet_sockets(pid: int) -> set[InternetSocket]:
    """Return the TCP and UDP sockets that a process holds."""
    inodes = _socket_inodes(pid)
    found = set()
    for table in TABLES:
        path = Path(f"/proc/{pid}/net/{table}")
        if not path.exists():  # a kernel without IPv6
            continue
        for line in path.read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes:
                local, port = _address(words[1])
                remote, remote_port = _address(words[2])
                found.add(
                    InternetSocket(
                        table, local, port, remote if remote_port else None, words[3] == LISTEN
                    )
                )
    return found


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        # A descriptor may be closed while we look.
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(handle)
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    return inodes


def _address(text: str) -> tuple[str, int]:
    digits, port = text.split(":")
    raw = bytes.fromhex(digits)
    words = [raw[i : i + WORD_BYTES][::-1] for i in range(0, len(raw), WORD_BYTES)]
    return str(ipaddress.ip_address(b"".join(words))), int(port, 16)


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
