"""Every message between host and worker, and nothing else.

Runs in: host and worker. No torch.

A message is one JSON object: small, readable in a dump, and decoding one can run no code. Tensors
never travel in a message; they lie in slots (``slots.py``) and a message refers to them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from comfy_xdit_patch.errors import MessageError

Tree: TypeAlias = Any
"""None, bool, int, float, str, list, dict with string keys, or a ``SlotRef`` as a dict."""


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

    ``options`` are the loader's ``model_options`` in plain values (dtypes by name).
    ``size_bytes`` and ``mtime_ns`` tell a file that was changed after ComfyUI read it.
    """

    loader: str
    path: str
    options: dict[str, Any]
    size_bytes: int
    mtime_ns: int


# host -> worker


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
    store_fd: int
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
    """Load a model's weights, if they are not loaded, and make them the current model."""

    request: int
    model: int
    source: ModelSource


@dataclass(frozen=True, slots=True)
class Unload:
    """Drop all weights."""

    request: int


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of the diffusion model.

    ``arguments`` is the tree of ``Flux._forward``'s keyword arguments. The ranks that own a part
    of the batch write it to the slot ``result``.
    """

    request: int
    model: int
    batch_degree: int
    ulysses_degree: int
    arguments: Tree
    result: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the process group and end."""


# worker -> host


@dataclass(frozen=True, slots=True)
class Joined:
    """The rank is in the process group. Seconds by phase."""

    rank: int
    pid: int
    device: str
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are in place. ``fingerprint`` is compared with the host's own model."""

    request: int
    fingerprint: str
    seconds: float


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """This rank could not load the model. It holds no weights and is well otherwise."""

    request: int
    error: str


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The weights are dropped."""

    request: int


@dataclass(frozen=True, slots=True)
class Done:
    """This rank's share of a call is computed.

    ``num_forwards`` counts this rank's calls since it started. ``dtype`` and ``shape`` describe
    the whole result; ``bytes_between_ranks`` is what this rank sent to other ranks in this call.
    """

    request: int
    num_forwards: int
    dtype: str
    shape: tuple[int, ...]
    seconds: float
    bytes_between_ranks: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class Failed:
    """This rank could not do what it was asked. The worker may still be alive."""

    request: int
    phase: str
    error: str
    traceback: str


Message: TypeAlias = (
    Start
    | Map
    | Unmap
    | Load
    | Unload
    | Forward
    | Stop
    | Joined
    | Loaded
    | NotLoaded
    | Unloaded
    | Done
    | Failed
)
Reply: TypeAlias = Loaded | NotLoaded | Unloaded | Done | Failed

_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Start,
        Map,
        Unmap,
        Load,
        Unload,
        Forward,
        Stop,
        Joined,
        Loaded,
        NotLoaded,
        Unloaded,
        Done,
        Failed,
    )
}


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
        names = {field.name for field in fields(cls)}
        if set(body) != names:
            raise ValueError(f"fields {sorted(body)} instead of {sorted(names)}")
        if "source" in body:
            body["source"] = ModelSource(**body["source"])
        if "shape" in body:
            body["shape"] = tuple(body["shape"])
        return cls(**body)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"Not a message of comfy-xdit-patch: {error} in {data[:80]!r}") from None
