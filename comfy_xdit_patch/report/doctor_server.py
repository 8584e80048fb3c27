"""Ask a running ComfyUI for its status, and judge it.

Runs in: the doctor's process.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comfy_xdit_patch.report.schema import SCHEMA
from comfy_xdit_patch.report.troubleshooting import remedy_of

ASK_DEADLINE_S = 3.0
WRONG_STATES = ("refused", "broken")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the report, and whether it is something to mend."""

    text: str
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: a status of our schema, or a line about why there is none."""

    status: dict[str, Any] | None
    line: Line | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the status, and not the short form for other machines."""
        return self.status is not None and "settings" in self.status


def ask(url: str) -> Answer:
    """Ask a running ComfyUI. One that does not run is not wrong."""
    try:
        with urllib.request.urlopen(f"{url}/xdit/status", timeout=ASK_DEADLINE_S) as answer:
            status: Any = json.load(answer)
    except urllib.error.HTTPError as error:
        return Answer(
            None,
            Line(
                f"answers {error.code}: it runs without comfy-xdit-patch. It is switched off "
                "there, not installed in that Python, or ComfyUI was not restarted since"
            ),
        )
    except (OSError, ValueError) as error:
        return Answer(None, Line(f"does not answer ({error}); what follows is of this shell"))
    if not isinstance(status, dict) or not {"version", "state"} <= status.keys():
        text = "answers, but not as comfy-xdit-patch does: something else listens there"
        return Answer(None, Line(text))
    schema = status.get("schema")
    if schema != SCHEMA:
        text = (
            f"answers as comfy-xdit-patch {status['version']} does, with a status of schema "
            f"{schema}; this doctor knows {SCHEMA}. Restart that ComfyUI, or run its own doctor"
        )
        return Answer(None, Line(text, is_wrong=True))
    return Answer(status)


def judged(status: dict[str, Any]) -> Iterator[Line]:
    """Say what a status says, and what of it is wrong. It may be the short form."""
    yield Line(f"comfy-xdit-patch {status['version']}")
    reason = status.get("reason")
    text = f"state: {status['state']}" + (f", {reason}" if reason else "")
    yield Line(text, is_wrong=status["state"] in WRONG_STATES)
    if "settings" not in status:
        steps, fell_back = status["steps_parallel"], status["steps_fell_back"]
        yield Line(f"{status['num_ranks']} ranks, {steps} steps parallel, {fell_back} fell back")
        yield Line("it says no more to other machines, unless it has XDIT_STATUS=all")
        return
    if status["remedy"]:
        yield Line(f"what to do: {status['remedy']}")
    if status["start"]:
        yield Line(f"{status['start']['stage']} since {status['start']['seconds']:.0f} s")
    for rank in status["ranks"]:
        yield Line(
            f"rank {rank['rank']}: {rank['device']} {rank['name']}, {rank['state']}, "
            f"pid {rank['pid']}, {rank['forwards']} forwards, {rank['restarts']} restarts"
        )
    if status["ranks"]:
        yield from _steps(status)
    if status["peer_to_peer_disabled"]:
        first = status["peer_to_peer_disabled"].splitlines()[0]
        yield Line(f"peer-to-peer is switched off, because with it: {first}")
    if status["last_error"] and status["last_error"]["text"] != reason:
        error = status["last_error"]["text"]
        yield Line(f"last error: {error.splitlines()[0]}")
        if remedy := remedy_of(error):
            yield Line(f"  what to do: {remedy}")


def _steps(status: dict[str, Any]) -> Iterator[Line]:
    totals = status["totals"]
    yield Line(f"{totals['steps_parallel']} steps parallel, {totals['steps_fell_back']} fell back")
    for each in status["fell_back"]:
        yield Line(f"fell back {each['count']} times: {each['reason']}")
        if each["remedy"]:
            yield Line(f"  what to do: {each['remedy']}")
    if totals["steps_chose_one_gpu"]:
        count = totals["steps_chose_one_gpu"]
        yield Line(f"{count} steps on one GPU, which auto had found to be the faster")
    if status["speedup"]:
        value, hours = status["speedup"]["value"], status["speedup"]["age_s"] / 3600
        yield Line(f"{value:.2f}x of ComfyUI alone, measured {hours:.1f} h ago")
