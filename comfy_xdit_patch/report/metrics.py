"""The status object as Prometheus reads it.

Runs in: host process. ``prometheus_client`` is imported at the first question. Nothing is
registered with it for the whole process: each text is made of one status by a registry of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from comfy_xdit_patch.report.schema import State, Status

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = {
    "runs": "Sampling runs of a FLUX model.",
    "controls_parallel": "Calls of a ControlNet that the ranks computed.",
    "controls_alone": "Calls of a ControlNet that ComfyUI computed in parallel steps.",
    "decodes_parallel": "Latents that the ranks decoded.",
    "decodes_alone": "Large latents that ComfyUI decoded while ranks were there.",
    "loads": "Models that the ranks read.",
    "gave_way": "Times that ranks gave a card's memory back to ComfyUI.",
    "losses": "Steps handed back because a rank was lost.",
    "share_changes": "Changes of the ranks' shares.",
}
"""Counts of ``Status.totals``, as ``xdit_<name>_total``."""
STEPS = {
    "gathered": "steps_gathered",
    "chose_one_gpu": "steps_chose_one_gpu",
    "measured": "steps_measured",
    "without_blocks": "steps_skipped",
}
BYTES = ("to_workers", "from_workers", "between_ranks", "weights")
MEMORY = ("total", "used", "free", "planned")
OF_RANKS = {
    "utilisation": ("utilisation_ratio", "Part of the device's time that all programs use."),
    "busy_share": ("busy_ratio", "Part of the last seconds in which it computed."),
    "uptime_s": ("uptime_seconds", "Since its process joined."),
    "load_s": ("load_seconds", "What its last load of a model took."),
    "step_s": ("step_seconds", "What its last step took."),
    "weight_bytes": ("weight_bytes", "Weights in use of the model that was loaded last."),
    "forwards": ("forwards", "Calls that its process computed."),
}


def metrics_text(status: Status, *, is_short: bool) -> bytes:
    """Return all metrics as text, in Prometheus's format 0.0.4.

    Args:
        is_short: for other machines: nothing but what their form of the status has.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    class Collector:
        def collect(self) -> Iterator[Metric]:
            yield from _families(status, is_short=is_short)

    registry = CollectorRegistry()
    registry.register(Collector())
    return bytes(generate_latest(registry))


def _families(status: Status, *, is_short: bool) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    totals = status.totals
    info = {"version": status.version, "schema": str(status.schema)}
    yield InfoMetricFamily("xdit", "Version of comfy-xdit-patch and of its status.", value=info)
    states = GaugeMetricFamily("xdit_state", "1 for the state that it is in.", labels=["state"])
    for state in get_args(State):
        states.add_metric([state], float(state == status.state))
    yield states
    yield GaugeMetricFamily("xdit_ranks", "Ranks, running or not.", value=len(status.ranks))
    steps = CounterMetricFamily("xdit_steps", "Calls of a FLUX model.", labels=["how"])
    steps.add_metric(["parallel"], totals.steps_parallel)
    steps.add_metric(["fell_back"], totals.steps_fell_back)
    if is_short:
        yield steps
        return
    for how, name in STEPS.items():
        steps.add_metric([how], getattr(totals, name))
    yield steps
    for name, text in COUNTERS.items():
        yield CounterMetricFamily(f"xdit_{name}", text, value=getattr(totals, name))
    moved = CounterMetricFamily("xdit_moved_bytes", "Bytes that were moved.", labels=["way"])
    for way in BYTES:
        moved.add_metric([way], getattr(totals, f"bytes_{way}"))
    yield moved
    reasons = CounterMetricFamily("xdit_fall_backs", "Steps that fell back.", labels=["reason"])
    for reason in status.fell_back:
        reasons.add_metric([reason.reason], reason.count)
    yield reasons
    if status.last_step_s is not None:
        yield GaugeMetricFamily("xdit_step_seconds", "The last step.", value=status.last_step_s)
    if status.speedup is not None:
        value, age_s = status.speedup.value, status.speedup.age_s
        yield GaugeMetricFamily("xdit_speedup_ratio", "Over ComfyUI alone.", value=value)
        yield GaugeMetricFamily("xdit_speedup_age_seconds", "Since that was measured.", value=age_s)
    yield from _of_ranks(status)


def _of_ranks(status: Status) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    busy = CounterMetricFamily("xdit_rank_busy_seconds", "What it computed.", labels=["rank"])
    restarts = CounterMetricFamily("xdit_rank_restarts", "Starts after a loss.", labels=["rank"])
    memory = GaugeMetricFamily("xdit_rank_memory_bytes", "Memory.", labels=["rank", "kind"])
    for rank in status.ranks:
        number = str(rank.rank)
        busy.add_metric([number], rank.busy_total_s)
        restarts.add_metric([number], rank.restarts)
        for kind in MEMORY:
            value = getattr(rank.memory, f"{kind}_bytes")
            if value is not None:
                memory.add_metric([number, kind], value)
    yield from (busy, restarts, memory)
    for field, (name, text) in OF_RANKS.items():
        gauge = GaugeMetricFamily(f"xdit_rank_{name}", text, labels=["rank"])
        for rank in status.ranks:
            value = getattr(rank, field)
            if value is not None:
                gauge.add_metric([str(rank.rank)], value)
        yield gauge
