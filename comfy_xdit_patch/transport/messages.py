"""Every message from host to worker, and the encoding of both directions.

Runs in: host and worker. No torch.

A message is one JSON object: small, readable in a dump, and decoding one can run no code. Tensors
never travel in a message; they lie in slots (``slots.py``) and a message refers to them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, get_args

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.transport.calls import Control, Fetch, Forget, Forward, Free, RunBlock, Tree
from comfy_xdit_patch.transport.fields import checks_of
from comfy_xdit_patch.transport.likeness import Follow, Reach, Reached
from comfy_xdit_patch.transport.probing import NotProbed, Probe, Probed
from comfy_xdit_patch.transport.replies import (
    Alive,
    Controlled,
    Declined,
    Done,
    Failed,
    Fetched,
    Joined,
    Joining,
    Loaded,
    Loading,
    NoRoom,
    NotLoaded,
    Raised,
    Ran,
    Unloaded,
)

MAX_ERROR_CHARS = 300
MAX_START_BYTES = 1 << 20
"""Of one ``Start`` and of what the nursery answers to it."""


@dataclass(frozen=True, slots=True)
class SlotRef:
    """One tensor in a slot. ``version`` changes with every write to that slot."""

    slot: int
    version: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's weights come from: which of ComfyUI's loaders, on which file.

    ``options`` are the loader's ``model_options`` in plain values (dtypes by name). ``file`` tells
    a file that was changed after ComfyUI read it (``files.py``). ``uncast`` names weights of the
    diffusion model that keep the file's dtype, whatever their module has. ``dtypes`` are the names
    of those that ComfyUI chose for the host's card: of the weights, and to compute in, which is
    empty for the same.
    """

    loader: str
    path: str
    options: dict[str, Any]
    file: str
    uncast: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Start:
    """First message: everything a worker inherits from the host."""

    comfyui_root: str
    sys_path: list[str]
    argv: list[str]
    parses_arguments: bool
    arguments: dict[str, Any]
    num_threads: int | None
    world_size: int
    join_timeout_s: float
    step_timeout_s: float


@dataclass(frozen=True, slots=True)
class Map:
    """A new slot. Its memory travels beside this message as a file descriptor."""

    slot: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """Slots that are not used any more."""

    slots: list[int]


@dataclass(frozen=True, slots=True)
class Load:
    """Hold a model in one state of its weights.

    A model comes from ``source``, or from ``tensors``, made by ``skeleton.py``; a rank that holds
    it already needs neither. ``state`` is made by ``patching/weights.py`` and ``key`` names its
    contents. ``mode`` is one of ``planning/residency.py``, and ``room_bytes`` what other models may
    take on the device beside this one, if that is limited. With ``verify`` the reply has a digest
    of every weight in use. ``grid`` and ``weights`` are those of the plan whose stages share the
    blocks, in the mode ``staged``. ``look`` are seed and parts of the ``Look`` (``fingerprint.py``)
    at the stored weights that the reply's fingerprint is made by; empty for none.
    """

    request: int
    model: int
    source: ModelSource | None
    tensors: Tree
    state: Tree
    key: str
    mode: str
    room_bytes: int | None
    verify: bool
    look: list[int] = field(default_factory=list)
    grid: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Unload:
    """Drop all models."""

    request: int


@dataclass(frozen=True, slots=True)
class GiveWay:
    """These ranks give their device's memory back, and keep what it takes to return."""

    request: int
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class Drop:
    """Models that do not exist in the host any more."""

    models: list[int]


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the process group and end."""


Message: TypeAlias = (
    Start
    | Map
    | Unmap
    | Load
    | Unload
    | GiveWay
    | Drop
    | Forward
    | Control
    | RunBlock
    | Fetch
    | Free
    | Forget
    | Probe
    | Follow
    | Reach
    | Stop
    | Joining
    | Joined
    | Alive
    | Loading
    | Loaded
    | NotLoaded
    | Unloaded
    | Done
    | Controlled
    | Ran
    | Fetched
    | Declined
    | NoRoom
    | Probed
    | NotProbed
    | Raised
    | Reached
    | Failed
)

_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Message)}
_CHECKS = {cls: checks_of(cls) for cls in (*_TYPES.values(), ModelSource)}


def encode(message: Message) -> bytes:
    """Turn a message into bytes."""
    body: dict[str, Any] = {"type": type(message).__name__}
    for name in message.__slots__:  # Not ``asdict``, which copies the whole tree of a call.
        body[name] = getattr(message, name)
    return json.dumps(body, separators=(",", ":"), default=asdict).encode()


def decode(data: bytes) -> Message:
    """Turn bytes into a message.

    Raises:
        MessageError: the bytes are not a message of ours.
    """
    try:
        body = json.loads(data)
        cls = _TYPES[body.pop("type")]
        if body.get("source") is not None:
            body["source"] = _made(ModelSource, body["source"])
        if "shape" in body:
            body["shape"] = tuple(body["shape"])
        return _made(cls, body)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = str(error)[:MAX_ERROR_CHARS]
        raise MessageError(f"Not a message of comfy-xdit-patch: {text} in {data[:80]!r}") from None


def _made(cls: type[Any], body: dict[str, Any]) -> Any:
    checks = _CHECKS[cls]
    if body.keys() != checks.keys():
        raise ValueError(f"fields {sorted(body)} instead of {sorted(checks)}")
    for name, check in checks.items():
        if not check(body[name]):
            raise ValueError(f"{name} of {cls.__name__} is a {type(body[name]).__name__}")
    return cls(**body)
