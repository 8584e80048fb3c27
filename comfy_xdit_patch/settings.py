"""Every XDIT_* variable, read once into one frozen ``Settings``.

Runs in: host and worker (and the command line). Standard library only.

This is the only module that reads settings from ``os.environ``; their table is ``variables.py``.
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
from comfy_xdit_patch.planning.strategy import BALANCING, Balancing, Strategy, parse_strategy
from comfy_xdit_patch.planning.transfers import TRANSFER_DTYPES, TransferDtype
from comfy_xdit_patch.variables import OF_XFUSER, VARIABLES

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AskedDevices:
    """What ``XDIT_GPUS`` asks for.

    ``indices`` are as ComfyUI's own process sees the GPUs, after ``--cuda-device``.
    """

    kind: Literal["all", "count", "indices", "uuids", "cpu", "off"]
    count: int = 0
    indices: tuple[int, ...] = ()
    uuids: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As a user writes it; a lone index has a comma."""
        if self.kind == "count":
            return str(self.count)
        if self.kind == "cpu":
            return f"cpu:{self.count}"
        if self.kind == "indices":
            return ",".join(map(str, self.indices)) + "," * (len(self.indices) == 1)
        return {"all": "all", "off": "0"}.get(self.kind) or ",".join(self.uuids)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of this process, checked."""

    gpus: AskedDevices
    strategy: Strategy
    balance: Balancing
    transfer_dtype: TransferDtype
    gpu_memory_bytes: int | None
    """None is ``auto``."""
    decodes: bool
    """Whether the ranks decode pictures."""
    captures: bool
    """Whether ranks make CUDA graphs of their forwards."""
    strict: bool
    starts_early: bool
    start_timeout_s: float
    step_timeout_s: float
    idle_timeout_s: float | None
    """None is ``off``."""
    cpu_threads: int
    log_dir: Path | None
    """None is the system's for temporary files."""
    is_status_open: bool
    """Whether all of the status is for other machines too."""
    takes_remote: bool
    """Whether other machines may change settings."""

    @property
    def of_workers(self) -> tuple[object, ...]:
        """What workers, or what is known of theirs, rests on: with others it takes new workers."""
        return self.strict, self.step_timeout_s, self.cpu_threads, self.transfer_dtype

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
        balance=parsed("XDIT_BALANCE", _one_of(BALANCING)),
        transfer_dtype=parsed("XDIT_TRANSFER_DTYPE", _one_of(TRANSFER_DTYPES)),
        gpu_memory_bytes=parsed("XDIT_GPU_MEMORY", _or_none("auto", _gib)),
        decodes=parsed("XDIT_VAE", _one_of(("auto", "off"))) == "auto",
        captures=parsed("XDIT_CUDA_GRAPHS", _one_of(("off", "on"))) == "on",
        strict=parsed("XDIT_STRICT", _one_of(("0", "1"))) == "1",
        starts_early=parsed("XDIT_START", _one_of(("early", "first"))) == "early",
        start_timeout_s=parsed("XDIT_START_TIMEOUT", _positive),
        step_timeout_s=parsed("XDIT_STEP_TIMEOUT", _positive),
        idle_timeout_s=parsed("XDIT_IDLE_TIMEOUT", _or_none("off", _positive)),
        cpu_threads=parsed("XDIT_CPU_THREADS", _count),
        log_dir=parsed("XDIT_LOG_DIR", _or_none("temporary", _folder)),
        is_status_open=parsed("XDIT_STATUS", _one_of(("local", "all"))) == "all",
        takes_remote=parsed("XDIT_REMOTE_SETTINGS", _one_of(("0", "1"))) == "1",
    )


def given(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every variable as it was changed, or as the user set it, or its default, legal or not."""
    values = {name: text for name, text in (changes or {}).items() if text}
    env = {**os.environ, **values}
    return {each.name: env.get(each.name, "").strip() or each.default for each in VARIABLES}


def written(settings: Settings) -> dict[str, str]:
    """Settings as a user would write them: reading that gives the same."""
    gib = None if settings.gpu_memory_bytes is None else settings.gpu_memory_bytes / 2**30
    return {
        "XDIT_GPUS": str(settings.gpus),
        "XDIT_STRATEGY": str(settings.strategy),
        "XDIT_BALANCE": settings.balance,
        "XDIT_TRANSFER_DTYPE": settings.transfer_dtype,
        "XDIT_GPU_MEMORY": _number(gib, "auto"),
        "XDIT_VAE": "auto" if settings.decodes else "off",
        "XDIT_CUDA_GRAPHS": "on" if settings.captures else "off",
        "XDIT_STRICT": str(int(settings.strict)),
        "XDIT_START": "early" if settings.starts_early else "first",
        "XDIT_START_TIMEOUT": _number(settings.start_timeout_s),
        "XDIT_STEP_TIMEOUT": _number(settings.step_timeout_s),
        "XDIT_IDLE_TIMEOUT": _number(settings.idle_timeout_s, "off"),
        "XDIT_CPU_THREADS": str(settings.cpu_threads),
        "XDIT_LOG_DIR": str(settings.log_dir or "temporary"),
        "XDIT_REMOTE_SETTINGS": str(int(settings.takes_remote)),
        "XDIT_STATUS": "all" if settings.is_status_open else "local",
    }


def _number(value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None else str(int(value) if value.is_integer() else value)


def unknown_names(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """XDIT_* variables that nothing reads, mostly misspelt, each with a hint."""
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


def parse_gpus(value: str) -> AskedDevices:
    """Parse ``XDIT_GPUS``.

    Raises:
        ValueError: the value is none of ``GPUS_LEGAL``.
    """
    text = value.strip()
    if text.lower() == "all":
        return AskedDevices("all")
    if match := re.fullmatch(r"cpu:([1-9]\d{0,2})", text.lower()):
        return AskedDevices("cpu", count=int(match[1]))
    if re.fullmatch(r"\d{1,3}", text):
        return AskedDevices("count", count=int(text)) if int(text) else AskedDevices("off")
    items = tuple(item.strip() for item in text.rstrip(",").split(","))
    if all(re.fullmatch(r"\d{1,3}", item) for item in items):
        indices = tuple(int(item) for item in items)
        if len(set(indices)) == len(indices):
            return AskedDevices("indices", indices=indices)
    is_uuids = all(re.fullmatch(r"GPU-[0-9a-fA-F-]{4,}", item) for item in items)
    if is_uuids and len({item.lower() for item in items}) == len(items):
        return AskedDevices("uuids", uuids=items)
    raise ValueError(value)


def _one_of(values: tuple[T, ...]) -> Callable[[str], T]:
    def parse(value: str) -> T:
        for each in values:
            if value.lower() == each:
                return each
        raise ValueError(value)

    return parse


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(value)
    return number


def _or_none(word: str, parse: Callable[[str], T]) -> Callable[[str], T | None]:
    return lambda value: None if value.lower() == word else parse(value)


def _gib(value: str) -> int:
    return int(_positive(value) * 2**30)


def _folder(value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise ValueError(value)
    return path


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError(value)
    return number
