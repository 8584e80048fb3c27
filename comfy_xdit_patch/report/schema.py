"""What ``GET /xdit/status`` says: one object, from which doctor, metrics and panels are made.

Runs in: host, and the doctor's process. Standard library only. ``docs/status.md`` says what each
field is, in which unit, and where it was measured. A test freezes names and types: a field that is
added, removed or gets another type is another ``SCHEMA``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from comfy_xdit_patch import __version__
from comfy_xdit_patch.planning.transfers import TransferDtype

SCHEMA = 1

State = Literal["refused", "off", "idle", "starting", "ready", "computing", "broken"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a GPU, whoever uses it; of a CPU rank, its process and what the machine has."""

    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    planned_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank: its device, its process, its work."""

    rank: int
    device: str
    name: str
    uuid: str | None
    comfyui_index: int | None
    state: State
    pid: int | None
    log: str | None
    uptime_s: float | None
    restarts: int
    start_s: dict[str, float] | None
    load_s: float | None
    weight_bytes: int | None
    memory: Memory
    utilisation: float | None
    busy_share: float
    forwards: int
    step_s: float | None
    busy_s: float | None
    busy_total_s: float
    control_s: float | None
    is_launch_bound: bool | None
    blocks_compiled: int
    graphs: int
    replays: int


@dataclass(frozen=True, slots=True)
class Start:
    """What the ranks are not ready yet for."""

    stage: Literal["starting", "loading"]
    seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """The sampling run that goes on."""

    step: int | None
    steps: int | None
    calls: int
    since_unix_s: float
    plan: str | None


@dataclass(frozen=True, slots=True)
class PlanStatus:
    """How the last call was shared."""

    name: str
    strategy: str
    world_size: int
    degrees: dict[str, int]
    why: str


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast as ComfyUI alone the ranks were when ``auto`` compared."""

    value: float
    measured_unix_s: float
    age_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of a step by one way, of those that ``auto`` counted."""

    fastest_s: float
    median_s: float


@dataclass(frozen=True, slots=True)
class VerdictStatus:
    """What ``auto`` found for one model and size of call."""

    model: str
    size: str
    taken: str
    speedup: float | None
    measured_unix_s: float
    age_s: float
    paces: dict[str, Measured]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why ComfyUI computed something itself, and what to do; no remedy if the page has none."""

    reason: str
    count: int
    remedy: str | None


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts since ComfyUI started; none of them ever goes down."""

    runs: int = 0
    steps_parallel: int = 0
    steps_fell_back: int = 0
    steps_chose_one_gpu: int = 0
    steps_measured: int = 0
    steps_skipped: int = 0
    steps_gathered: int = 0
    controls_parallel: int = 0
    controls_alone: int = 0
    decodes_parallel: int = 0
    decodes_alone: int = 0
    loads: int = 0
    gave_way: int = 0
    losses: int = 0
    weights_verified: int = 0
    share_changes: int = 0
    bytes_to_workers: int = 0
    bytes_from_workers: int = 0
    bytes_between_ranks: int = 0
    bytes_weights: int = 0


@dataclass(frozen=True, slots=True)
class RunReport:
    """One finished sampling run. ``ms_per_step`` is the median over parallel steps.

    A measured step is one that ComfyUI computed alone, to be compared; ``speedup`` is what came out
    of that, for this kind of step, in this run or an earlier one.

    A gathered step is a parallel one in which a node's code around the blocks ran in the host; a
    skipped one is a step in which a node had no block run, or computed them itself.
    """

    steps: int
    steps_parallel: int
    steps_fell_back: int
    steps_chose_one_gpu: int
    steps_gathered: int
    steps_skipped: int
    steps_measured: int
    gather_reasons: dict[str, int]
    fall_back_reasons: dict[str, int]
    ms_per_step: float | None
    speedup: float | None
    strategy: str | None
    plan: str | None
    is_exact: bool
    """Not with PipeFusion, but for its first calls, and not where heads travel in 8 bits."""
    transfer_dtype: TransferDtype
    steps_warm_up: int
    """Exact calls of PipeFusion."""
    ranks: int


@dataclass(frozen=True, slots=True)
class LastError:
    """The last thing that went wrong, with its figures."""

    text: str
    unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """All of it."""

    schema: int = SCHEMA
    version: str = __version__
    state: State
    reason: str | None = None
    remedy: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    settings_changed: list[str] = field(default_factory=list)
    ranks: list[RankStatus] = field(default_factory=list)
    peer_to_peer_disabled: str | None = None
    start: Start | None = None
    start_s: float | None = None
    run: Progress | None = None
    plan: PlanStatus | None = None
    residency: list[str] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    speedup: Speedup | None = None
    verdicts: list[VerdictStatus] = field(default_factory=list)
    totals: Counts = field(default_factory=Counts)
    fell_back: list[Reason] = field(default_factory=list)
    controls_alone: list[Reason] = field(default_factory=list)
    decodes_alone: list[Reason] = field(default_factory=list)
    last_run: RunReport | None = None
    last_step_s: float | None = None
    last_decode_s: float | None = None
    last_loss_unix_s: float | None = None
    last_error: LastError | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for this machine."""
        return asdict(self)

    def short(self) -> dict[str, Any]:
        """As JSON, for others: no path, number of a process, UUID, text of an error or setting."""
        return {
            "schema": self.schema,
            "version": self.version,
            "state": self.state,
            "num_ranks": len(self.ranks),
            "steps_parallel": self.totals.steps_parallel,
            "steps_fell_back": self.totals.steps_fell_back,
        }
