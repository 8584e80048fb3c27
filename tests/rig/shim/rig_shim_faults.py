"""Plant faults in real processes: at a named point of a rank, once, when a test has ordered it.

Runs in: host, nursery and worker of a rig server whose environment has ``RIG_FAULTS``, a directory.

A test writes an order, the file ``<point>.<who>`` whose text is a kind of fault; who is a rank's
number, ``host`` or ``nursery``. The first such process to come to that point takes the file away
and obeys.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ORDERS = os.environ.get("RIG_FAULTS")
WITHIN = 3
"""Which exchange of a request is the one in whose middle something happens."""
DELAY_S = 2.0
FOREVER_S = 3600.0


def who_is_here() -> str:
    """Who this process is at its start: the host, the nursery of its ranks, or another program."""
    if any("comfy_xdit_patch.worker.nursery" in word for word in sys.orig_argv):
        return "nursery"
    return "host" if "main.py" in sys.orig_argv else "other"


who = who_is_here()


def taken(point: str) -> str | None:
    """Take the order for this point, if there is one."""
    assert ORDERS is not None
    order, mine = f"{ORDERS}/{point}.{who}", f"{ORDERS}/taken-{os.getpid()}"
    try:
        os.rename(order, mine)
    except OSError:
        return None
    with open(mine) as file:
        return file.read()


def obey(kind: str | None) -> None:
    """Do what is ordered, in this process."""
    import ctypes
    import signal

    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "segv":
        ctypes.string_at(8)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exception":
        raise RuntimeError("planted")
    elif kind == "oom":
        import torch

        raise torch.OutOfMemoryError("planted: tried to allocate 2.00 GiB")
    elif kind == "hang":
        time.sleep(FOREVER_S)
    elif kind == "delay":
        time.sleep(DELAY_S)
    elif kind == "dead link":
        cut_links()
    elif kind == "tell modules":
        with open(f"{ORDERS}/modules.{who}", "w") as file:
            file.write("\n".join(sys.modules))
    elif kind == "tell variables":
        with open(f"{ORDERS}/variables.{who}", "w") as file:
            file.writelines(f"{name}={value}\n" for name, value in os.environ.items())
    elif kind is not None:
        raise ValueError(f"the order {kind!r}")


def cut_links() -> None:
    """Shut down every TCP connection of this process, as a dying network card does."""
    import contextlib
    import socket

    for name in os.listdir("/proc/self/fd"):
        try:
            link = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if link.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # It listens.
                link.shutdown(socket.SHUT_RDWR)
        link.close()


def around(owner: Any, name: str, point: str, after: str | None = None) -> None:
    """Make a point before a function, and one after it."""
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    function = original.__func__ if isinstance(original, classmethod) else original

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        obey(taken(point))
        out = function(*args, **kwargs)
        if after is not None:
            obey(taken(after))
        return out

    setattr(owner, name, classmethod(wrapped) if function is not original else wrapped)


def adapt_nursery(nursery: Any) -> None:
    """A rank is who it is from its fork on."""
    around(nursery, "warm_up", "warming", "warm")
    become = nursery._become_rank

    def become_rank(born: Any, *args: Any) -> None:
        global who
        who = str(born.rank)
        become(born, *args)

    nursery._become_rank = become_rank
    fork = nursery._fork

    def fork_with_points(*args: Any) -> bool:
        obey(taken("fork"))
        is_nursery = fork(*args)
        if is_nursery:
            obey(taken("forked"))
        return bool(is_nursery)

    nursery._fork = fork_with_points


def adapt_process(process: Any) -> None:
    around(process, "serve", "start")


def adapt_joining(joining: Any) -> None:
    around(joining, "restore_host_state", "import")


def adapt_groups(groups: Any) -> None:
    around(groups.Groups, "join", "join", "joined")
    around(groups.Groups, "leave", "shutdown")


def adapt_first_exchange(first_exchange: Any) -> None:
    check, exchange = first_exchange.check, first_exchange.collectives.all_to_all_async

    def other_data(out: Any, *args: Any, **kwargs: Any) -> Any:
        work = exchange(out, *args, **kwargs)
        work.wait()
        out[-1] += 1
        return work

    def check_with_point(groups: Any) -> None:
        kind = taken("exchange")
        if kind == "other data":
            first_exchange.collectives.all_to_all_async = other_data
        else:
            obey(kind)
        check(groups)

    first_exchange.check = check_with_point


def adapt_engine(engine: Any) -> None:
    around(engine.Engine, "drop", "unload")


def adapt_calls(calls: Any) -> None:
    cls = calls.Calls
    around(cls, "control", "control")
    around(cls, "run_block", "block")
    forward, share = cls.forward, calls.forward_share

    def share_of_nan(flux: Any, arguments: Any, **kwargs: Any) -> Any:
        return share(flux, {**arguments, "x": arguments["x"] * float("nan")}, **kwargs)

    def forward_with_points(self: Any, message: Any) -> Any:
        global _num_exchanges
        _num_exchanges = 0
        kind = taken("before")
        calls.forward_share = share_of_nan if kind == "nan" else share
        obey(None if kind == "nan" else kind)
        done = forward(self, message)
        obey(taken("after"))
        return done

    cls.forward = forward_with_points


def adapt_residents(residents: Any) -> None:
    around(residents.Residents, "take", "load")


def adapt_placing(placing: Any) -> None:
    around(placing, "place_whole", "patch")


_num_exchanges = 0


def adapt_collectives(collectives: Any) -> None:
    exchange = collectives.all_to_all_async

    def all_to_all_async(*args: Any, **kwargs: Any) -> Any:
        global _num_exchanges
        _num_exchanges += 1
        if _num_exchanges == WITHIN:
            obey(taken("within"))  # The others are in it already, or will be.
        return exchange(*args, **kwargs)

    collectives.all_to_all_async = all_to_all_async


def adapt_channel(channel: Any) -> None:
    send = channel.Channel.send

    def send_with_points(self: Any, message: Any, **options: Any) -> int:
        if type(message).__name__ == "Done":
            kind = taken("reply")
            frame = channel.frame_of(message)
            if kind == "torn":
                self._socket.sendall(frame[: len(frame) // 2])
                obey("kill")
            elif kind == "half":
                self._socket.sendall(frame[: len(frame) // 2])
                obey("stop")
            elif kind == "garbage":
                self._socket.sendall(frame[:4] + os.urandom(len(frame) - 4))
                obey("hang")
            elif kind == "too long":
                self._socket.sendall(b"\xff" * 64)
                obey("hang")
            else:
                obey(kind)
        return send(self, message, **options)  # type: ignore[no-any-return]

    channel.Channel.send = send_with_points


def adapt_back_off(back_off: Any) -> None:
    """Try again at once: tests have no ten minutes."""
    back_off.AFTER_START_S = (0.5,)
    back_off.AFTER_LOSS_S = (0.0,)


def refuse_memory() -> None:
    """Make points of the host's calls of the system for our shared memory."""
    create = os.memfd_create

    def memfd_create(name: str, *args: Any) -> int:
        point = {"comfy-xdit-slot": "slot", "comfy-xdit-store": "store"}.get(name)
        if point is not None and taken(point) is not None:
            raise OSError(28, "No space left on device (planted)")
        return create(name, *args)

    os.memfd_create = memfd_create


def adaptations() -> dict[str, list[Callable[[Any], None]]]:
    """What to do after which module was executed; in no environment but a test's, nothing."""
    if ORDERS is None or who == "other":
        return {}
    if who == "host":
        refuse_memory()
        return {"comfy_xdit_patch.host.pool.pool": [adapt_back_off]}
    return {
        "comfy_xdit_patch.worker.nursery": [adapt_nursery],
        "comfy_xdit_patch.worker.process": [adapt_process],
        "comfy_xdit_patch.worker.joining": [adapt_joining],
        "comfy_xdit_patch.worker.calls": [adapt_calls],
        "comfy_xdit_patch.worker.engine": [adapt_engine],
        "comfy_xdit_patch.worker.ranks.groups": [adapt_groups],
        "comfy_xdit_patch.worker.ranks.first_exchange": [adapt_first_exchange],
        "comfy_xdit_patch.worker.weights.residents": [adapt_residents],
        "comfy_xdit_patch.worker.weights.placing": [adapt_placing],
        "comfy_xdit_patch.worker.ranks.collectives": [adapt_collectives],
        "comfy_xdit_patch.wire.channel": [adapt_channel],
    }
