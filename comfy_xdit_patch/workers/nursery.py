"""Import torch, ComfyUI and the engine once, and fork every rank from that.

Runs in: nursery process.

Forking is sound here and only here: this process has one thread, and has not started CUDA. Both are
checked before each fork. ComfyUI itself starts CUDA when it is imported for GPUs, so GPU ranks find
torch here and import ComfyUI themselves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from comfy_xdit_patch.transport.messages import Start, decode
from comfy_xdit_patch.workers import process

MAX_BYTES = 1 << 20
FDS_OF_A_RANK = 3

log = logging.getLogger(__name__)


def main() -> None:
    """Entry point; the host passes the socket, its own number and whether ranks are CPU ranks."""
    fd, host_pid = map(int, sys.argv[1:3])
    process.die_with(host_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [nursery] %(message)s")
    serve(socket.socket(fileno=fd), host_pid)


def serve(host: socket.socket, host_pid: int) -> None:
    """Fork ranks until the host closes its end."""
    children: dict[int, int] = {}
    while True:
        poller = select.poll()
        for fd in (host.fileno(), *children):
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll():
            if fd in children:
                pid = children.pop(fd)
                os.close(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _tell(host, {"ended": pid, "code": code})
                continue
            data, fds, _, _ = socket.recv_fds(host, MAX_BYTES, FDS_OF_A_RANK)
            if not data:
                return
            if fds:
                pidfd, pid = _fork(json.loads(data), fds, host, host_pid, children)
                children[pidfd] = pid
            else:
                start = decode(data)
                assert isinstance(start, Start)
                warm_up(start)


def warm_up(start: Start) -> None:
    """Import what ranks need. What fails here fails in each rank too, and is reported there."""
    gc.disable()
    try:
        import torch

        if start.num_threads is not None:
            torch.set_num_threads(1)
            from comfy_xdit_patch.workers.environment import restore_host_state

            restore_host_state(start)
            import comfy_xdit_patch.engine.engine  # noqa: F401
    except Exception:
        log.exception("could not import everything that ranks need")
    gc.freeze()


def _fork(
    order: dict[str, Any],
    fds: list[int],
    host: socket.socket,
    host_pid: int,
    siblings: Iterable[int],
) -> tuple[int, int]:
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: a fork would lose all but one"
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda.is_initialized(), "CUDA does not survive a fork"
    nursery_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        for sibling in siblings:
            os.close(sibling)
        _become_rank(order, fds, host, host_pid, nursery_pid)
    pidfd = os.pidfd_open(pid)
    for fd in fds:
        os.close(fd)
    answer = json.dumps({"pid": pid}).encode()
    socket.send_fds(host, [answer], [pidfd])
    return pidfd, pid


def _become_rank(
    order: dict[str, Any], fds: list[int], host: socket.socket, host_pid: int, nursery_pid: int
) -> NoReturn:
    try:
        process.die_with(nursery_pid)
        channel_fd, store_fd, log_fd = fds
        host.close()
        for standard in (1, 2):
            os.dup2(log_fd, standard)
        os.close(log_fd)
        os.environ.clear()
        os.environ.update(order["environment"])
        faulthandler.enable()
        for handler in logging.root.handlers[:]:
            logging.root.removeHandler(handler)
        process.serve(order["rank"], channel_fd, store_fd, host_pid)
    except BaseException:
        log.exception("a rank failed outside of its loop")
    os._exit(1)


def _tell(host: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # The host is gone, and this process will see it.
        host.send(json.dumps(message).encode())
