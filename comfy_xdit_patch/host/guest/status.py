"""The status object, put together from all that knows a part of it.

Runs in: host process, in the thread of ComfyUI's server: nothing here waits for anything.
"""

from __future__ import annotations

import time

from comfy_xdit_patch.errors import SettingsError
from comfy_xdit_patch.hardware.devices import Device, visible_gpus
from comfy_xdit_patch.hardware.usage import Gauge
from comfy_xdit_patch.host import page
from comfy_xdit_patch.host.guest.host import Host
from comfy_xdit_patch.host.pace.auto import Auto
from comfy_xdit_patch.host.pool.crew import Crew
from comfy_xdit_patch.host.pool.launcher import Worker
from comfy_xdit_patch.host.pool.pool import PoolState
from comfy_xdit_patch.host.run import Run
from comfy_xdit_patch.planning.grid import AS_WRITTEN
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.verdict import Verdict
from comfy_xdit_patch.report.schema import (
    Measured,
    Memory,
    PlanStatus,
    Progress,
    RankStatus,
    Speedup,
    Start,
    State,
    Status,
    VerdictStatus,
)
from comfy_xdit_patch.report.troubleshooting import remedy_of
from comfy_xdit_patch.settings import given, read_settings, written


def inactive(state: State, reason: str | None) -> Status:
    """The status of a process in which nothing of ours runs."""
    return Status(
        state=state,
        reason=reason,
        remedy=None if reason is None else remedy_of(reason),
        settings=given(),
    )


class Reporter:
    """Makes the status of an active process."""

    def __init__(self) -> None:
        self._gauge = Gauge()
        self._indices: dict[str | None, int] | None = None

    def status(self, host: Host) -> Status:
        """Everything that a user or a test may want to know."""
        pool, totals = host.pool, host.totals
        crew = pool.crew  # Once: the keeper's thread may take it away any time.
        run = next(reversed(host.runs.copy()), None)
        state: State = "off" if host.settings.is_off else pool.state.value
        if state == "ready" and run is not None:
            state = "computing"
        counted = totals.of_status()
        if pool.state is PoolState.STARTING:
            counted["start"] = Start("starting", time.monotonic() - pool.start_since_s)
        shown = written(host.settings)
        return Status(
            state=state,
            reason=pool.error,
            remedy=None if pool.error is None else remedy_of(pool.error),
            settings=shown,
            settings_changed=_changed(shown),
            ranks=self._ranks(host, crew),
            peer_to_peer_disabled=pool.no_peer_to_peer,
            start_s=round(pool.start_seconds, 3) or None,
            run=None if run is None else _progress(run),
            plan=_plan(totals.plan_of_last_step(), host),
            speedup=_speedup(host.auto),
            verdicts=_verdicts(host.auto),
            **counted,
        )

    def _ranks(self, host: Host, crew: Crew | None) -> list[RankStatus]:
        pool, totals, now_s = host.pool, host.totals, time.monotonic()
        if host.settings.is_off:
            return []
        living: dict[int, Worker] = {}
        if crew is not None:
            living = {each.rank: each for each in crew.workers if each.process.poll() is None}
        devices = [each.device for each in crew.workers] if crew else pool.devices
        pids = [
            living[rank].process.pid if rank in living else None for rank in range(len(devices))
        ]
        used = self._gauge.read(
            list(zip(devices, pids, strict=True)), cpu_threads=host.settings.cpu_threads
        )
        ranks = []
        for rank, device in enumerate(devices):
            worker, index, usage = living.get(rank), self._index(device), used[rank]
            own = crew if worker else None
            since_s = own.since_s if own else None
            ranks.append(
                RankStatus(
                    rank=rank,
                    device="cpu" if device.is_cpu else "cuda" if index is None else f"cuda:{index}",
                    name=device.name,
                    uuid=device.uuid,
                    comfyui_index=index,
                    state="ready" if worker else pool.state.value,
                    pid=pids[rank],
                    log=str(worker.log_path) if worker else None,
                    uptime_s=None if since_s is None else now_s - since_s,
                    restarts=pool.num_restarts,
                    start_s=own.joined[rank].seconds if own else None,
                    weight_bytes=own.weight_bytes.get(rank) if own else None,
                    memory=Memory(
                        total_bytes=usage.total_bytes,
                        used_bytes=usage.used_bytes,
                        free_bytes=usage.free_bytes,
                        planned_bytes=totals.planned(),
                    ),
                    utilisation=usage.utilisation,
                    **totals.of_rank(rank, now_s, since_s),
                )
            )
        return ranks

    def _index(self, device: Device) -> int | None:
        """The number that ComfyUI's process has for a GPU; None for one that it does not see."""
        if device.is_cpu:
            return None
        if self._indices is None:
            self._indices = {gpu.uuid: index for index, gpu in enumerate(visible_gpus())}
        return self._indices.get(device.uuid)


def _changed(shown: dict[str, str]) -> list[str]:
    """Names of settings that are not those of the environment."""
    try:
        of_environment = written(read_settings())
    except SettingsError:  # Somebody set a variable since ComfyUI started.
        of_environment = given()
    return [name for name, value in shown.items() if of_environment[name] != value]


def _progress(run: Run) -> Progress:
    step, steps = page.progress() or (None, None)
    plan = run.counts.plan
    return Progress(
        step=step,
        steps=steps,
        calls=run.num_calls,
        since_unix_s=run.since_unix_s,
        plan=plan.name if plan else None,
    )


def _plan(plan: ParallelPlan | None, host: Host) -> PlanStatus | None:
    if plan is None:
        return None
    strategy = host.settings.strategy
    why = f"XDIT_STRATEGY={strategy}"
    if host.auto.is_on:
        is_measured = any(verdict.taken == plan.name for verdict in _known(host.auto).values())
        why = "auto: the fastest that was measured" if is_measured else "auto: not compared yet"
    return PlanStatus(
        name=plan.name,
        strategy=plan.strategy,
        world_size=plan.world_size,
        degrees={axis: getattr(plan, axis) for axis in AS_WRITTEN},
        why=why,
    )


def _known(auto: Auto) -> dict[tuple[str, str], Verdict]:
    """What holds for each model and size, the last that was asked for at the end."""
    return {
        (case.model, case.size): record.verdict
        for case, record in tuple(auto.records.items())
        if record.verdict is not None
    }


def _speedup(auto: Auto) -> Speedup | None:
    for verdict in reversed(_known(auto).values()):
        if verdict.speedup is not None:
            return Speedup(verdict.speedup, verdict.unix_s, time.time() - verdict.unix_s)
    return None


def _verdicts(auto: Auto) -> list[VerdictStatus]:
    return [
        VerdictStatus(
            model=model,
            size=size,
            taken=verdict.taken,
            speedup=verdict.speedup,
            measured_unix_s=verdict.unix_s,
            age_s=time.time() - verdict.unix_s,
            paces={
                way: Measured(pace.fastest_s, pace.median_s) for way, pace in verdict.paces.items()
            },
        )
        for (model, size), verdict in _known(auto).items()
    ]
