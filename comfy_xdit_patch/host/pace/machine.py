"""Have the workers measure the machine, and make of it what the planner reads.

Runs in: host process.

Asked for once of each crew of ranks, and only when somebody wants it: it takes about a
second. That it was not measured is logged and costs nothing else. A worker that is lost in it is
lost as in any other request.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.hardware.interconnect import Interconnect
from comfy_xdit_patch.hardware.survey import survey
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.exchange import Poll
from comfy_xdit_patch.host.pool.pool import Pool
from comfy_xdit_patch.planning.cost.known_machines import card_of
from comfy_xdit_patch.planning.cost.link_timing import (
    fit,
    links_of,
    measurements,
    name_of,
    slowest,
)
from comfy_xdit_patch.planning.cost.machine import HOST_CALL_S, Gpu, LinkKind, Machine
from comfy_xdit_patch.planning.cost.rank_time import SMALL_MATRIX_ROWS
from comfy_xdit_patch.wire.messages.replies import NotProbed, Probed, Reply, short
from comfy_xdit_patch.wire.messages.requests import Probe

log = logging.getLogger("comfy_xdit_patch")

BUDGET_S = 1.0
MAX_POINTS = 16
RATES = {
    "linear_flops",
    "linear_rows",
    "attention_flops",
    "copy_bytes_per_s",
    "host_bytes_per_s",
    "call_s",
}
REFERENCE_CALL_S = 7.2e-6
"""What ``call_s`` is on the CPU on which ``HOST_CALL_S`` was measured: a call of a model has much
more around it than one of a loop, and both take longer on a slower CPU."""


class Measuring:
    """The machine as the workers that live now have measured it."""

    def __init__(self, pool: Pool, *, budget_bytes: int | None) -> None:
        """Prepare; nothing is measured.

        Args:
            budget_bytes: of each card, if the user set one.
        """
        self._pool = pool
        self._budget_bytes = budget_bytes
        self._crew: weakref.ref[Crew] | None = None
        """Those that have measured it."""
        self._machine: Machine | None = None
        self._interconnect: Interconnect | None = None
        self._why_not: str | None = None
        self._seconds: float | None = None

    def machine(self, poll: Poll) -> Machine | None:
        """Return the machine, its GPUs in rank order; None if it could not be measured.

        Args:
            poll: called about every 20 ms; an exception that it raises ends the wait.

        Raises:
            WorkerError: the workers did not start, or are lost.
        """
        crew = self._pool.wait_until_ready(poll)
        if self._is_of(crew):
            return self._machine
        replies = self._ask(crew, poll)
        if self._interconnect is None:
            self._interconnect = survey(self._pool.devices, poll=poll)
        failed = [
            f"rank {rank}: {short(reply.error)}"
            for rank, reply in enumerate(replies)
            if isinstance(reply, NotProbed)
        ]
        probed = [reply for reply in replies if isinstance(reply, Probed)]
        self._machine = None if failed else self._made_of(crew, probed)
        self._why_not = "; ".join(failed) or None
        self._seconds = max((reply.seconds for reply in probed), default=None)
        self._crew = weakref.ref(crew)
        if failed:
            log.warning("xDiT: the machine is not measured: %s", self._why_not)
        else:
            log.info("xDiT: machine measured in %.1f s", self._seconds)
        return self._machine

    def status(self) -> dict[str, Any]:
        """What was measured, in plain numbers, as JSON."""
        machine = self._machine if self._is_of(self._pool.crew) else None
        return {
            "peer_to_peer_disabled": self._pool.no_peer_to_peer,
            "not_measured": self._why_not,
            "measured_in_s": self._seconds if machine else None,
            "host_call_s": machine.host_call_s if machine else None,
            "ranks": [_of_gpu(gpu) for gpu in machine.gpus] if machine else [],
            "rank_0_alone": _of_gpu(machine.alone) if machine and machine.alone else None,
            "links": self._of_links(machine) if machine else [],
        }

    def _is_of(self, crew: Crew | None) -> bool:
        return crew is not None and self._crew is not None and self._crew() is crew

    def _ask(self, crew: Crew, poll: Poll) -> Sequence[Reply]:
        with crew.turn(poll) as turn:
            replies = turn.ask(Probe(turn.number, BUDGET_S))
            for rank, reply in enumerate(replies):
                if isinstance(reply, Probed):
                    _check(rank, reply, replies, self._pool.world_size)
        return replies

    def _made_of(self, crew: Crew, replies: Sequence[Probed]) -> Machine:
        gpus = tuple(self._gpu(crew, rank, reply.together) for rank, reply in enumerate(replies))
        world_size = len(replies)
        timings = {
            measurement: fit(slowest([reply.exchanges[name_of(*measurement)] for reply in replies]))
            for measurement in measurements(world_size)
        }
        call_s = max(reply.together["call_s"] for reply in replies)
        return Machine(
            gpus=gpus,
            links=links_of(world_size, timings, self._kind),
            host_call_s=HOST_CALL_S * call_s / REFERENCE_CALL_S,
            are_links_timed=True,
            alone=self._gpu(crew, 0, replies[0].alone),
        )

    def _gpu(self, crew: Crew, rank: int, rates: Mapping[str, float]) -> Gpu:
        device, joined = self._pool.devices[rank], crew.joined[rank]
        card = card_of(device.name)
        rows = rates["linear_rows"]
        linear = rates["linear_flops"] * (rows + SMALL_MATRIX_ROWS) / rows
        memory = joined.total_bytes if rank == 0 else joined.free_bytes
        if device.is_cpu:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        place = self._interconnect.places[rank] if self._interconnect else None
        return Gpu(
            name=device.name,
            memory_bytes=self._budget_bytes or memory,
            linear_flops=linear,
            attention_flops=rates["attention_flops"],
            fp8_flops=linear * card.fp8 / card.linear if card else 0.0,
            memory_bytes_per_s=rates["copy_bytes_per_s"],
            host_bytes_per_s=rates["host_bytes_per_s"],
            socket=(place.numa_node if place else None) or 0,
        )

    def _kind(self, a: int, b: int) -> LinkKind:
        if self._pool.devices[a].is_cpu or self._pool.no_peer_to_peer is not None:
            return "host"
        kind = self._interconnect.kind(a, b) if self._interconnect else None
        return kind or "pcie"

    def _of_links(self, machine: Machine) -> list[dict[str, Any]]:
        return [
            {
                "ranks": [a, b],
                "path": self._interconnect.path(a, b) if self._interconnect else "unknown",
                "kind": machine.links[a][b].kind,
                "all_to_all_gb_per_s": machine.links[a][b].all_to_all_bytes_per_s / 1e9,
                "ring_gb_per_s": machine.links[a][b].ring_bytes_per_s / 1e9,
                "latency_us": machine.links[a][b].latency_s * 1e6,
                "ring_step_us": machine.links[a][b].step_s * 1e6,
            }
            for a in range(len(machine.gpus))
            for b in range(a + 1, len(machine.gpus))
        ]


def _of_gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "device": gpu.name,
        "numa_node": gpu.socket,
        "linear_tflops": gpu.linear_flops / 1e12,
        "attention_tflops": gpu.attention_flops / 1e12,
        "memory_gb_per_s": gpu.memory_bytes_per_s / 1e9,
        "from_host_gb_per_s": gpu.host_bytes_per_s / 1e9,
    }


def _check(rank: int, reply: Probed, replies: Sequence[Reply], world_size: int) -> None:
    """See whether a worker can have measured that; it becomes divisors.

    Ranks exchange the same sizes, for they do so together.

    Raises:
        MessageError: it cannot.
    """
    names = {name_of(*measurement) for measurement in measurements(world_size)}
    points = [point for each in reply.exchanges.values() for point in each]
    rates = [*reply.together.values(), *reply.alone.values()]
    is_well = (
        set(reply.together) == RATES
        and set(reply.alone) == (RATES if rank == 0 else set())
        and set(reply.exchanges) == names
        and all(0 < len(each) <= MAX_POINTS for each in reply.exchanges.values())
        and all(len(point) == 2 for point in points)
        and all(_sizes(reply) == _sizes(other) for other in replies if isinstance(other, Probed))
        and all(_is_measure(value) for value in [*rates, reply.seconds])
        and all(_is_measure(value) for point in points for value in point)
    )
    if not is_well:
        raise MessageError(f"Rank {rank} has measured what cannot be.")


def _sizes(reply: Probed) -> dict[str, list[float]]:
    return {name: [each[0] for each in points if each] for name, points in reply.exchanges.items()}


def _is_measure(value: float) -> bool:
    return math.isfinite(value) and 1e-12 < value < 1e18
