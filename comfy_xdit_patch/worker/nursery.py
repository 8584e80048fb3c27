"""Import what ranks need once, and fork every rank from that.

Runs in: nursery process; ``_become_rank`` in each rank.

A fork is sound here and only here: this process has one thread, and nothing in it has opened a
GPU. Both are looked at before each fork. Where an import broke that, the process executes itself
anew with nothing imported, and each rank imports for itself.

ComfyUI starts CUDA when it is imported for GPUs. So for GPU ranks this process imports the packages
that ComfyUI imports, and each rank imports ComfyUI's own modules itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from comfy_xdit_patch.wire.messages.codec import MAX_START_BYTES, decode
from comfy_xdit_patch.wire.messages.requests import Start
from comfy_xdit_patch.worker import process

FDS_OF_A_RANK = 4
BEFORE_CUDA = ("torch", "torch._dynamo", "transformers", "einops", "safetensors.torch")
"""What takes long of ComfyUI's imports, and leaves the GPUs alone."""

log = logging.getLogger(__name__)


def main() -> None:
    """Entry point. Arguments: the socket, the host's number, ``warm`` or ``cold``, its ranks."""
    fd, host_pid = map(int, sys.argv[1:3])
    process.die_with(host_pid)
    process.be_called("xdit-nursery")
    # Before any import, so that a crash during an import is reported too.
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [nursery] %(message)s")
    ranks = {os.pidfd_open(int(pid)): int(pid) for pid in sys.argv[4:]}
    nursery_pid = os.getpid()
    born = serve(socket.socket(fileno=fd), host_pid, ranks, is_cold=sys.argv[3] == "cold")
    if born is not None:
        _become_rank(born, host_pid, nursery_pid)


@dataclass(frozen=True, slots=True)
class Born:
    """What the nursery tells the rank that it forks."""

    rank: int
    variables: dict[str, str | None]
    """Environment variables to set in the rank; None removes one."""
    fds: list[int]
    """File descriptors of the rank's channel, of the store, of the mailboxes and of its log."""


def serve(
    host: socket.socket, host_pid: int, ranks: dict[int, int], *, is_cold: bool
) -> Born | None:
    """Fork ranks until the host closes its end.

    Args:
        ranks: process numbers of the ranks that live already, by a descriptor of each process.
        is_cold: this process imported nothing, because an import would make a fork unsound.

    Returns:
        In each rank, what the rank is told; so its tracebacks hold no frames of this process.
    """
    while True:
        poller = select.poll()
        for fd in (host.fileno(), *ranks):
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll():
            if fd in ranks:
                _reap(fd, ranks.pop(fd), host)
                continue
            unsound = None if is_cold else why_no_fork()
            if unsound is not None:
                log.warning("ranks import for themselves: %s", unsound)
                _start_cold(host, host_pid, ranks.values())
            data, fds, _, _ = socket.recv_fds(host, MAX_START_BYTES, FDS_OF_A_RANK)
            if not data:
                return None
            if fds:
                born = Born(**json.loads(data), fds=fds)
                if not _fork(born, host, ranks):
                    return born
            else:
                start = decode(data)
                assert isinstance(start, Start)
                warm_up(start)


def warm_up(start: Start) -> None:
    """Import what ranks need. What fails here fails in each rank too, and is reported there."""
    gc.disable()
    try:
        if start.num_threads is None:
            for name in BEFORE_CUDA:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        else:
            import torch

            torch.set_num_threads(1)
            from comfy_xdit_patch.worker.joining import restore_host_state

            restore_host_state(start)
            import comfy_xdit_patch.worker.engine
            import comfy_xdit_patch.worker.ranks.first_exchange  # noqa: F401
    except Exception:
        log.exception("could not import everything that ranks need")
    gc.freeze()


def why_no_fork() -> str | None:
    """Why a fork of this process would not be sound."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        return f"an import left {threads} threads, and a fork has only one of them"
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # That of the listing itself.
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/nvidia"):
                return "an import has opened a GPU, which does not survive a fork"
    return None


def _start_cold(host: socket.socket, host_pid: int, ranks: Iterable[int]) -> NoReturn:
    """Execute this program anew. The process keeps its number, its host and its ranks."""
    host.set_inheritable(True)
    arguments = [str(host.fileno()), str(host_pid), "cold", *map(str, ranks)]
    command = sys.orig_argv[: sys.orig_argv.index("-c") + 2]
    os.execv(sys.executable, [*command, *arguments])


def _reap(pidfd: int, pid: int, host: socket.socket) -> None:
    os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # The host is gone, and this process will see it.
        host.send(json.dumps({"ended": pid, "code": code}).encode())


def _fork(born: Born, host: socket.socket, ranks: dict[int, int]) -> bool:
    """Fork a rank. Returns whether this is still the nursery."""
    pid = os.fork()
    if pid == 0:
        for fd in (host.detach(), *ranks):
            os.close(fd)
        return False
    pidfd = os.pidfd_open(pid)
    ranks[pidfd] = pid
    for fd in born.fds:
        os.close(fd)
    with contextlib.suppress(OSError):  # The host is gone, and this process will see it.
        socket.send_fds(host, [json.dumps({"pid": pid}).encode()], [pidfd])
    return True


def _become_rank(born: Born, host_pid: int, nursery_pid: int) -> NoReturn:
    try:
        process.die_with(nursery_pid)
        channel_fd, store_fd, mailbox_fd, log_fd = born.fds
        for standard in (1, 2):
            os.dup2(log_fd, standard)
        os.close(log_fd)
        for name, value in born.variables.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        for handler in logging.root.handlers[:]:
            logging.root.removeHandler(handler)
        process.serve(born.rank, channel_fd, store_fd, mailbox_fd, host_pid)
    except BaseException:
        log.exception("a rank failed outside of its loop")
    os._exit(1)
