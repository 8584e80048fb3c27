"""One worker: join the other ranks, serve the host, leave.

Runs in: worker process, forked by ``nursery.py``, which uses ``die_with`` and ``be_called`` too.

A worker ends with its host, whatever ends the host: the kernel kills it when the host's process
ends (PR_SET_PDEATHSIG), and its channel reports end of file.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from comfy_xdit_patch.errors import ChannelClosedError, DeadlineExceededError
from comfy_xdit_patch.wire.channel import Channel
from comfy_xdit_patch.wire.messages.codec import Message
from comfy_xdit_patch.wire.messages.replies import Alive, Failed, Loading, Reached, Unloaded
from comfy_xdit_patch.wire.messages.requests import (
    Control,
    Decode,
    Drop,
    Fetch,
    Follow,
    Forget,
    Forward,
    Free,
    GiveWay,
    Load,
    Map,
    Reach,
    RunBlock,
    Start,
    Stop,
    Unload,
    Unmap,
)
from comfy_xdit_patch.worker.joining import REPLY_DEADLINE_S, join

if TYPE_CHECKING:
    from comfy_xdit_patch.wire.slots import SlotMap
    from comfy_xdit_patch.worker.engine import Engine
    from comfy_xdit_patch.worker.ranks.groups import Groups

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
IDLE_WAIT_S = 3600.0
PROGRESS_S = 0.25

log = logging.getLogger(__name__)


BEAT_S = 0.25
SEND_DEADLINE_S = 30.0


class Worker:
    """The serve loop of one rank."""

    def __init__(self, *, rank: int, channel: Channel, store_fd: int, mailbox_fd: int) -> None:
        self._store_fd = store_fd
        self._mailbox_fd = mailbox_fd
        self._rank = rank
        self._channel = channel
        self._phase = "start"

    def run(self) -> None:
        """Start, then serve until the host says stop or is gone."""
        request = 0
        try:
            start = self._channel.receive(deadline_s=IDLE_WAIT_S)
            assert isinstance(start, Start)
            engine, slots, groups, heartbeat = self._join(start)
            while True:
                message = self._next_message()
                if isinstance(message, Stop):
                    groups.leave()
                    return
                request = getattr(message, "request", 0)
                with heartbeat.during(request):
                    self._serve(message, engine, slots)
        except ChannelClosedError:
            log.info("the host is gone")
        except Exception as error:
            # A rank that failed leaves the others inside a collective: it reports and ends, and
            # the host ends the rest. Nothing is computed by half a world.
            log.exception("failed in %s", self._phase)
            text = f"{type(error).__name__}: {error}"
            report = Failed(request, self._phase, text, traceback.format_exc())
            self._channel.send(report, deadline_s=REPLY_DEADLINE_S)
            _leave_at_once(1)

    def _join(self, start: Start) -> tuple[Engine, SlotMap, Groups, Heartbeat]:
        groups = join(
            start,
            rank=self._rank,
            channel=self._channel,
            store_fd=self._store_fd,
            mailbox_fd=self._mailbox_fd,
            entering=self._enter_phase,
        )
        from comfy_xdit_patch.wire.slots import SlotMap
        from comfy_xdit_patch.worker.engine import Engine
        from comfy_xdit_patch.worker.process import Heartbeat
        from comfy_xdit_patch.worker.ranks import collectives
        from comfy_xdit_patch.worker.shard import compiled_blocks

        slots = SlotMap(groups.device)
        heartbeat = Heartbeat(
            self._channel, lambda: collectives.num_begun() + compiled_blocks.num_moves()
        )
        heartbeat.start()
        return Engine(groups=groups, slots=slots), slots, groups, heartbeat

    def _enter_phase(self, phase: str) -> None:
        self._phase = phase

    def _next_message(self) -> Message:
        while True:
            try:
                return self._channel.receive(deadline_s=IDLE_WAIT_S)
            except DeadlineExceededError:
                continue  # Nothing to do for an hour is no fault.

    def _serve(self, message: Message, engine: Engine, slots: SlotMap) -> None:
        if isinstance(message, Map):
            slots.add(message.slot, self._channel.take_fd(), message.size_bytes)
        elif isinstance(message, Unmap):
            slots.drop(message.slots)
        elif isinstance(message, Load):
            self._phase = f"loading {message.source.path if message.source else 'tensors'}"
            self._channel.send(
                engine.load(message, self._progress(message.request)), deadline_s=REPLY_DEADLINE_S
            )
        elif isinstance(message, Unload):
            self._phase = "unloading"
            engine.drop()
            self._channel.send(Unloaded(message.request), deadline_s=REPLY_DEADLINE_S)
        elif isinstance(message, GiveWay):
            self._phase = "giving way"
            engine.give_way(message.ranks)
            self._channel.send(Unloaded(message.request), deadline_s=REPLY_DEADLINE_S)
        elif isinstance(message, Drop):
            self._phase = "dropping models"
            engine.drop(message.models)
        elif isinstance(message, (Forward, Control, RunBlock, Fetch, Decode)):
            self._phase = type(message).__name__
            self._channel.send(engine.compute(message), deadline_s=REPLY_DEADLINE_S)
            engine.answered()
        elif isinstance(message, Reach):
            self._phase = "looking what a model's code reaches"
            self._channel.send(_reached(message), deadline_s=REPLY_DEADLINE_S)
        elif isinstance(message, Follow):
            self._phase = "following the host's settings"
            _follow(message)
            engine.settings_changed()
        elif isinstance(message, Forget):
            engine.forget(message)
        elif isinstance(message, Free):
            self._channel.send(engine.free(message), deadline_s=REPLY_DEADLINE_S)
        else:
            raise TypeError(f"A worker cannot serve {type(message).__name__}.")

    def _progress(self, request: int) -> Callable[[float], None]:
        """Tell the host how far a load is, a few times a second."""
        said = time.monotonic()

        def progress(done: float) -> None:
            nonlocal said
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                self._channel.send(Loading(request, done), deadline_s=REPLY_DEADLINE_S)

        return progress


def _reached(message: Reach) -> Reached:
    from comfy_xdit_patch.wire.torch_settings import modes, own_kernels
    from comfy_xdit_patch.worker.reach import reached

    in_blocks, around = reached(message.in_blocks, message.around)
    return Reached(message.request, in_blocks, around, sorted(own_kernels()), modes())


def _follow(message: Follow) -> None:
    from comfy_xdit_patch.wire import torch_settings
    from comfy_xdit_patch.worker.joining import follow_arguments

    torch_settings.follow(message.torch)
    follow_arguments(message.arguments)


def _leave_at_once(code: int) -> NoReturn:
    """End without running exit handlers: a process group with a lost peer can hang in them."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def die_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It ended before the call above.
        _leave_at_once(1)


def be_called(name: str) -> None:
    """Name this process for people: ``ps`` and ``top`` show it."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def serve(rank: int, channel_fd: int, store_fd: int, mailbox_fd: int, host_pid: int) -> NoReturn:
    """Be a rank, from the fork to the end of the process."""
    be_called(f"xdit-rank-{rank}")
    # The host asks a rank that hangs where it is; the answer is the end of its log.
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s",
    )
    try:
        channel = Channel.from_fd(channel_fd, peer_pid=host_pid)
    except (ChannelClosedError, OSError) as error:
        log.error("not started by its host: %s", error)
        _leave_at_once(1)
    Worker(rank=rank, channel=channel, store_fd=store_fd, mailbox_fd=mailbox_fd).run()
    _leave_at_once(0)


class Heartbeat:
    """Tells the host, while a request is served, that this process runs; silent otherwise."""

    def __init__(self, channel: Channel, count: Callable[[], int]) -> None:
        """Prepare; ``start`` starts the thread.

        Args:
            count: grows with every exchange between ranks, and with all that is compiled.
        """
        self._channel = channel
        self._count = count
        self._request: int | None = None
        self._is_awake = threading.Event()
        """Stays set between requests that follow each other: to wake a thread holds up a rank."""

    def start(self) -> None:
        """Start the thread, which lives as long as the process."""
        threading.Thread(target=self._run, name="xdit-heartbeat", daemon=True).start()

    @contextmanager
    def during(self, request: int) -> Iterator[None]:
        """Beat while this lasts, for this request."""
        self._request = request
        if not self._is_awake.is_set():
            self._is_awake.set()
        try:
            yield
        finally:
            self._request = None

    def _run(self) -> None:
        try:
            while True:
                self._is_awake.wait()
                time.sleep(BEAT_S)  # Before the first beat: most steps end earlier.
                request = self._request
                if request is not None:
                    self._channel.send(Alive(request, self._count()), deadline_s=SEND_DEADLINE_S)
                    continue
                self._is_awake.clear()
                if self._request is not None:  # It began before it could see that.
                    self._is_awake.set()
        except (ChannelClosedError, DeadlineExceededError):
            return  # The host is gone or does not read; the serving thread finds out too.
