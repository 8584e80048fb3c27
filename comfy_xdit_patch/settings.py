"""Every XDIT_* variable, read once into one frozen ``Settings``.

Runs in: host and worker (and the command line). Standard library only.

This is the only module that reads settings from ``os.environ``; ``variables.py`` has the table of
them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from comfy_xdit_patch.errors import SettingsError
from comfy_xdit_patch.strategy import BALANCING, Balancing, Strategy, parse_strategy
from comfy_xdit_patch.variables import VARIABLES

T = TypeVar("T")

OF_XFUSER = ("XDIT_LOGGING_LEVEL",)
"""Variables of the same prefix that xfuser reads."""


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """What ``XDIT_GPUS`` asks for.

    ``indices`` are as ComfyUI's own process sees the GPUs, after ``--cuda-device``.
    """

    kind: Literal["all", "count", "indices", "uuids", "cpu", "off"]
    count: int = 0
    indices: tuple[int, ...] = ()
    uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of this process, checked."""

    gpus: DeviceRequest
    strategy: Strategy
    balance: Balancing
    gpu_memory_bytes: int | None
    """None is ``auto``."""
    strict: bool
    starts_early: bool
    start_timeout_s: float
    step_timeout_s: float
    cpu_threads: int
    log_dir: Path | None
    """None is the system's for temporary files."""

    @property
    def is_off(self) -> bool:
        """Whether the user asked for stock ComfyUI."""
        return self.strategy.name == "off" or self.gpus.kind == "off"


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check all variables.

    Raises:
        SettingsError: a value is not legal.
    """
    env = os.environ if environ is None else environ

    def parsed(name: str, parse: Callable[[str], T]) -> T:
        variable = next(v for v in VARIABLES if v.name == name)
        value = env.get(name, "").strip() or variable.default
        try:
            return parse(value)
        except ValueError:
            raise SettingsError(
                f'{name}="{value}" is not legal. Legal: {variable.legal}.'
            ) from None

    return Settings(
        gpus=parsed("XDIT_GPUS", parse_gpus),
        strategy=parsed("XDIT_STRATEGY", parse_strategy),
        balance=parsed("XDIT_BALANCE", _balancing),
        gpu_memory_bytes=parsed("XDIT_GPU_MEMORY", _gib_or_auto),
        strict=parsed("XDIT_STRICT", _one_of(("0", "1"))) == "1",
        starts_early=parsed("XDIT_START", _one_of(("early", "first"))) == "early",
        start_timeout_s=parsed("XDIT_START_TIMEOUT", _positive),
        step_timeout_s=parsed("XDIT_STEP_TIMEOUT", _positive),
        cpu_threads=parsed("XDIT_CPU_THREADS", _count),
        log_dir=parsed("XDIT_LOG_DIR", _folder),
    )


def unknown_names(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """XDIT_* variables that nobody reads, most for a typing error in the name, each with a hint."""
    known = [variable.name for variable in VARIABLES]
    hints = {}
    for name in sorted(os.environ if environ is None else environ):
        if name.startswith("XDIT_") and name not in known and name not in OF_XFUSER:
            close = difflib.get_close_matches(name, known, n=1)
            names = ", ".join(known)
            hints[name] = f"Did you mean {close[0]}?" if close else f"There are {names}."
    return hints


def cache_directory(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where this package keeps what it measured; it need not exist. None: there is no home."""
    env = os.environ if environ is None else environ
    base = env.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "comfy-xdit-patch"
    except RuntimeError:  # HOME is not set, and the system does not know this user.
        return None


def parse_gpus(value: str) -> DeviceRequest:
    """Parse ``XDIT_GPUS``.

    Raises:
        ValueError: the value is none of ``GPUS_LEGAL``.
    """
    text = value.strip()
    if text.lower() == "all":
        return DeviceRequest("all")
    if match := re.fullmatch(r"cpu:([1-9]\d{0,2})", text.lower()):
        return DeviceRequest("cpu", count=int(match[1]))
    if re.fullmatch(r"\d{1,3}", text):
        return DeviceRequest("count", count=int(text)) if int(text) else DeviceRequest("off")
    items = tuple(item.strip() for item in text.rstrip(",").split(","))
    if all(re.fullmatch(r"\d{1,3}", item) for item in items):
        indices = tuple(int(item) for item in items)
        if len(set(indices)) == len(indices):
            return DeviceRequest("indices", indices=indices)
    is_uuids = all(re.fullmatch(r"GPU-[0-9a-fA-F-]{4,}", item) for item in items)
    if is_uuids and len({item.lower() for item in items}) == len(items):
        return DeviceRequest("uuids", uuids=items)
    raise ValueError(value)


def _one_of(values: tuple[str, ...]) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in values:
            raise ValueError(value)
        return value.lower()

    return parse


def _balancing(value: str) -> Balancing:
    for balancing in BALANCING:
        if value.lower() == balancing:
            return balancing
    raise ValueError(value)


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(value)
    return number


def _gib_or_auto(value: str) -> int | None:
    return None if value.lower() == "auto" else int(_positive(value) * 2**30)


def _folder(value: str) -> Path | None:
    if value.lower() == "temporary":
        return None
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise ValueError(value)
    return path


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError(value)
    return number
