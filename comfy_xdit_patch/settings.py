"""Every XDIT_* variable, read once into one frozen ``Settings``.

Runs in: host and worker (and the command line). Standard library only.

This is the only module that reads settings from ``os.environ``; ``docs/settings.md`` is generated
from the table below, and a test freezes the set of names.
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
from comfy_xdit_patch.planning.strategy import LEGAL as STRATEGY_LEGAL

GPUS_LEGAL = (
    "all, a count such as 4, a list of indices such as 0,2,3, GPU UUIDs such as GPU-1a2b..., "
    "cpu:N for N CPU ranks, or 0 to switch off"
)


OF_XFUSER = ("XDIT_LOGGING_LEVEL",)
"""Variables of the same prefix that xfuser reads."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One XDIT_* variable: what a user may write and what it means."""

    name: str
    default: str
    legal: str
    meaning: str
    is_changeable: bool = True
    """While ComfyUI runs, by ``POST /xdit/settings``."""


VARIABLES = (
    Variable(
        "XDIT_GPUS",
        "all",
        GPUS_LEGAL,
        "Which GPUs make one image together. A lone number is a count, a list (with a comma) is "
        "indices as ComfyUI's own process sees them. `cpu:N` starts N CPU ranks, for trying it "
        "out without a GPU.",
    ),
    Variable(
        "XDIT_STRATEGY",
        "auto",
        STRATEGY_LEGAL,
        "How the work is shared. `auto` shares a batch first (also the "
        "conditional and unconditional half of CFG), then the token sequence. Another exact plan "
        "that could be faster, and ComfyUI alone, take turns with it in the first steps of a model "
        "and size, the fastest is taken from then on, and `comfy-xdit verdicts` shows and clears "
        "what is remembered. "
        "A name puts all ranks on one axis: `batch` shares rows, `ulysses` tokens by all-to-all, "
        "`ring` tokens by passing keys and values round, `usp` tokens by both, `tensor` the heads "
        "and columns of every block, with their weights: each card holds a part of the blocks, and "
        "sends more than with `ulysses`. `fsdp` shares as `auto` does, unmeasured, and shards the "
        "weights over all ranks, which `auto` does only where they do not fit. A plan gives the "
        "degree of each axis, in any order; their product is the number of ranks, and so are "
        "`fsdp` and `modulation` in it. With `modulation` each rank holds a part of what modulates "
        "FLUX.1's blocks, 27 % of its weights; `auto` does so where the model fits only then. "
        "All of these are exact. `pipefusion` is an approximation, used only by name or in "
        "a plan such as `pipefusion=2,ulysses=2`: blocks in stages, tokens in patches that stream "
        "through them, keys and values of the step before for the patches to come. A call that the "
        "named strategy cannot share runs on one GPU, and the log says why. "
        "`off` leaves stock ComfyUI: nothing is wrapped, nothing is imported.",
    ),
    Variable(
        "XDIT_BALANCE",
        "adaptive",
        "even, weighted, adaptive or least_loaded",
        "How much of the work each rank gets: tokens, heads and rows of the batch. `even`: all "
        "the same. `weighted`: in proportion to the speed measured in the first six calls of a "
        "model; then fixed until the workers start anew. `adaptive`: measured all the time, and "
        "changed between two steps when there is at least 4 % of a call to gain; ranks that are "
        "about as fast as each other keep even shares. `least_loaded`: as `adaptive`, and at the "
        "start of a run the shares also follow what other programs took of each rank's device "
        "just before: of a GPU's time (asked of NVML, process by process) or else of its memory "
        "when the worker started, of a CPU rank's cores; at most half is taken off, as if two"
        " programs shared the device evenly. Shares say where a token is computed, so the "
        "image is the same, up to rounding. While a node keeps something on the ranks from step "
        "to step, shares stay as they are until the run ends; and they stay even where a larger "
        "one would not fit on its card beside the weights.",
    ),
    Variable(
        "XDIT_GPU_MEMORY",
        "auto",
        "auto, or GiB of each card, a number above 0 such as 24",
        "How much memory of each card the workers may plan with. `auto` asks the cards. A number "
        "plans as if every card had that much, whether more or less is there; it works with CPU "
        "ranks too. `comfy-xdit doctor` shows the plan that follows: all weights on every card, "
        "weights sharded over the ranks, or weights in CPU memory.",
    ),
    Variable(
        "XDIT_VAE",
        "auto",
        "auto or off",
        "Whether the ranks decode large pictures together when the steps are done. `auto`: from "
        "1024 x 1024 px on, with a VAE of FLUX's as ComfyUI loads it; the first four pictures of a "
        "size are decoded by the ranks and by ComfyUI in turn, and the faster way is taken from "
        "then on. `off`: ComfyUI decodes.",
    ),
    Variable(
        "XDIT_STRICT",
        "0",
        "0 or 1",
        "1 turns every fall-back to one GPU into an error. For tests and benchmarks.",
    ),
    Variable(
        "XDIT_START",
        "early",
        "early or first",
        "How the workers start. `early`: their imports begin as soon as ComfyUI's server is up, in "
        "the background, in one process that ranks are then made from; it holds about 400 MB of "
        "memory, and nothing of any GPU. The ranks start with the first FLUX model, and until they "
        "are ready, ComfyUI computes alone where its own copy of the model is at hand; then the "
        "image goes on in parallel. `first`: all begins with the first FLUX model, and its image "
        "waits for it.",
    ),
    Variable(
        "XDIT_START_TIMEOUT",
        "180",
        "seconds, a number above 0",
        "How long all workers together may take to start, import ComfyUI and join. After that "
        "the missing ranks are named with the last lines of their logs, and ComfyUI goes on alone.",
    ),
    Variable(
        "XDIT_STEP_TIMEOUT",
        "600",
        "seconds, a number above 0",
        "How long the workers may go on without any sign of progress, in a load or in the first "
        "step of its kind, before they count as hung. They are then ended and the step is run on "
        "one GPU. Later steps have ten times what the slowest one took, and 20 seconds at least.",
    ),
    Variable(
        "XDIT_IDLE_TIMEOUT",
        "off",
        "off, or seconds, a number above 0",
        "After how long without a FLUX image the ranks end, between two prompts, and give back all "
        "that they hold: memory, cards, ports. The next FLUX model starts them as the first one "
        "did. The process that `XDIT_START=early` makes them from stays; with `first` it ends too.",
    ),
    Variable(
        "XDIT_CPU_THREADS",
        "1",
        "a whole number from 1",
        "Threads of one CPU rank.",
    ),
    Variable(
        "XDIT_LOG_DIR",
        "temporary",
        "temporary, or the absolute path of a folder, which is made if it is not there",
        "Where the workers' logs lie. `temporary` is the system's folder for temporary files. Each "
        "ComfyUI makes a folder of its own in it, which stays until the second start after it.",
        is_changeable=False,
    ),
    Variable(
        "XDIT_REMOTE_SETTINGS",
        "0",
        "0 or 1",
        "1 lets other machines that reach ComfyUI's port change settings too, and whoever comes "
        "through a proxy or by another name of this machine; see [security](security.md).",
        is_changeable=False,
    ),
    Variable(
        "XDIT_STATUS",
        "local",
        "local or all",
        "Who is told everything by `GET /xdit/status` and `GET /xdit/metrics`. `local`: whoever "
        "asks from this machine; others get the state, the number of ranks and two counts. "
        "`all`: whoever reaches ComfyUI's port.",
    ),
)


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
    gpu_memory_bytes: int | None
    """None is ``auto``."""
    decodes: bool
    """Whether the ranks decode pictures."""
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
        return self.strict, self.step_timeout_s, self.cpu_threads

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
        gpu_memory_bytes=parsed("XDIT_GPU_MEMORY", _or_none("auto", _gib)),
        decodes=parsed("XDIT_VAE", _one_of(("auto", "off"))) == "auto",
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
        "XDIT_GPU_MEMORY": _number(gib, "auto"),
        "XDIT_VAE": "auto" if settings.decodes else "off",
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
