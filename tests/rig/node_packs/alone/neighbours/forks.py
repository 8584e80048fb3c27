"""A pack with threads that compute, and processes forked in the middle of everything.

Runs in: a ComfyUI process of a test server.

A forked child has a copy of every descriptor of its parent, and lives for a while. The worst
moment is while a rank is ordered from the nursery, between making a socket pair and closing the
end that is the rank's: Python announces such a message, so it can be hit every time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import torch

CHILD_S = 20.0
EVERY_S = 0.5
MAX_CHILDREN = 3
AT_A_START = "forks_at_a_start"

_children: set[int] = set()
_counts = {"threads": 0, "forks": 0, "forks_at_a_start": 0, "subprocesses": 0}
_lock = threading.Lock()


def counts() -> dict[str, int]:
    """How often each was at work."""
    return {**_counts, "children": len(_children)}


def _compute() -> None:
    # Not torch's own one: ComfyUI draws its noise from that. Seen on stock ComfyUI: 2 wrong images
    # of 60.
    generator = torch.Generator()
    while True:
        matrix = torch.randn(64, 64, generator=generator)
        torch.linalg.norm(matrix @ matrix)
        _counts["threads"] += 1
        time.sleep(0.02)


def _fork(why: str) -> None:
    parent = os.getpid()
    with _lock:
        pid = os.fork()
        if pid == 0:
            end = time.monotonic() + CHILD_S
            while os.getppid() == parent and (time.monotonic() < end or why == AT_A_START):
                time.sleep(0.5)
            os._exit(0)
        if why != AT_A_START:  # those live as long as their parent
            _children.add(pid)
        _counts[why] += 1


def _fork_now_and_then() -> None:
    while True:
        for pid in list(_children):
            if os.waitpid(pid, os.WNOHANG)[0]:
                _children.discard(pid)
        if len(_children) < MAX_CHILDREN:
            _fork("forks")
        subprocess.run(["true"], check=True)
        _counts["subprocesses"] += 1
        time.sleep(EVERY_S)


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.sendmsg" and args[0].type == socket.SOCK_SEQPACKET:
        _fork(AT_A_START)


sys.addaudithook(_watch)
for target in (_compute, _compute, _fork_now_and_then):
    threading.Thread(target=target, daemon=True).start()
