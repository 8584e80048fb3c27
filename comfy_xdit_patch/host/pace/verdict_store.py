"""Keep what ``auto`` measured from one start of ComfyUI to the next, in one small file.

Runs in: host, and the process of ``comfy-xdit verdicts``.

The file is ``verdicts.json`` in our cache directory. It holds no prompt and no path: names and
UUIDs of devices, versions, model classes, sizes, seconds, and when. Deleting it is always safe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comfy_xdit_patch.host.pace.case import Case
from comfy_xdit_patch.planning.strategy import parse_strategy
from comfy_xdit_patch.planning.verdict import DAY_S, NUM_RUNS, ONE, Pace, Verdict
from comfy_xdit_patch.settings import cache_directory

log = logging.getLogger(__name__)

FORMAT = 2
MAX_VERDICTS = 500
"""The oldest go first."""


class VerdictStore:
    """The file, as a mapping from cases to verdicts. What cannot be read is measured again."""

    def __init__(self, path: Path | None = None) -> None:
        """Name the file; it is read at the first question."""
        self._path = path
        self._verdicts: dict[str, Verdict] | None = None

    @property
    def path(self) -> Path | None:
        """None where there is no place for it: what is measured lasts as long as the process."""
        directory = cache_directory()
        return self._path or (None if directory is None else directory / "verdicts.json")

    def all(self) -> dict[str, Verdict]:
        """All verdicts by the key of their case, the oldest first."""
        if self._verdicts is None:
            self._verdicts = self._read()
        return self._verdicts

    def find(self, case: Case) -> Verdict | None:
        return self.all().get(case.key)

    def keep(self, case: Case, verdict: Verdict) -> None:
        """Add a verdict to those that are in the file now."""
        # Another ComfyUI may have written since.
        verdicts = self.all() if self.path is None else self._read()
        verdicts.pop(case.key, None)
        verdicts[case.key] = verdict
        self._verdicts = dict(list(verdicts.items())[-MAX_VERDICTS:])
        if self.path is None:
            return
        try:
            self._write(self._verdicts, self.path)
        except OSError as error:
            log.warning("xDiT: what auto measured cannot be kept in %s: %s", self.path, error)

    def clear(self) -> int:
        """Forget everything; return how many verdicts there were."""
        num_verdicts = len(self._read())
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self._verdicts = {}
        return num_verdicts

    def _read(self) -> dict[str, Verdict]:
        if self.path is None:
            return {}
        try:
            body = json.loads(self.path.read_text())
            if body["format"] != FORMAT:
                return {}
            return {str(key): _verdict(item) for key, item in body["verdicts"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("xDiT: %s cannot be read and is begun anew: %s", self.path, error)
            return {}

    def _write(self, verdicts: dict[str, Verdict], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {"format": FORMAT, "verdicts": {k: asdict(v) for k, v in verdicts.items()}}
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix="verdicts-")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(body, file, indent=1)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _verdict(item: dict[str, Any]) -> Verdict:
    paces = {
        str(way): Pace(float(pace["fastest_s"]), float(pace["median_s"]))
        for way, pace in item["paces"].items()
    }
    verdict = Verdict(paces, float(item["unix_s"]), int(item["num_runs"]))
    for way in paces.keys() - {ONE}:
        parse_strategy(way)
    is_measured = all(0 < pace.fastest_s <= pace.median_s < math.inf for pace in paces.values())
    if len(paces) < 2 or not is_measured or not math.isfinite(verdict.unix_s):
        raise ValueError(f"{item} is no verdict")
    return verdict


def report(*, clear: bool) -> str:
    """What ``comfy-xdit verdicts`` prints."""
    store = VerdictStore()
    if store.path is None:
        return "Nothing is kept: this user has no home folder. XDG_CACHE_HOME can name another."
    if clear:
        return f"Forgot {store.clear()} verdicts of {store.path}."
    lines = [f"What XDIT_STRATEGY=auto measured, in {store.path}:"]
    now_s = time.time()
    for key, verdict in store.all().items():
        lines += [f"  {key}", *(f"      {line}" for line in _lines(verdict, now_s))]
    return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing yet"])


def _lines(verdict: Verdict, now_s: float) -> list[str]:
    speedup = "" if verdict.speedup is None else f" ({verdict.speedup:.2f}x of one)"
    age = _hours(now_s - verdict.unix_s)
    if verdict.taken != ONE:
        next_look = "once the ranks are slower than one was" if speedup else "with one"
        follows = f"{verdict.taken} is taken{speedup}; measured again {next_look}"
    elif verdict.is_doubted(now_s):
        follows = f"one is taken{speedup}; measured again in the next run"
    else:
        left = _hours(verdict.unix_s + DAY_S - now_s)
        runs = NUM_RUNS - verdict.num_runs
        follows = f"one is taken{speedup}; measured again in {left}, or after {runs} runs"
    return [f"{text_of(verdict)}; {age} ago", follows]


def text_of(verdict: Verdict) -> str:
    """Every way, the fastest first, with what a step takes and how far its steps are apart."""
    return ", ".join(
        f"{way} {pace.fastest_s * 1000:.0f} ms a step (+{pace.spread:.0%})"
        for way, pace in sorted(verdict.paces.items(), key=lambda item: item[1].fastest_s)
    )


def _hours(seconds: float) -> str:
    return f"{max(0.0, seconds) / 3600:.1f} h"
