"""What the host asks of the ranks.

Runs in: host and worker. No torch. ``grid`` and ``weights`` are those of the call's
``ParallelPlan``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Tree: TypeAlias = Any
"""None, bool, int, float, str, list, dict with string keys: what ``wire/values.py`` makes."""
_PLAIN = (bool, int, float, str, type(None))


def is_plain(option: Any) -> bool:
    """Whether one of ComfyUI's options is sent to the workers, who set it as it is here."""
    return isinstance(option, _PLAIN) or (
        isinstance(option, list) and all(isinstance(item, _PLAIN) for item in option)
    )


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
class Residence:
    """Which of a model's weights a rank has, and where.

    ``mode`` says where its blocks lie: on its card, there but for what modulates them, of which it
    has a part, in shards of their bytes on the cards of all ranks, or in CPU memory. ``cast`` is
    ``modulation`` with weights in the dtype that ComfyUI would cast them to for each call.
    ``tensor_degree`` is into how many parts each block is cut by heads and columns. ``grid`` and
    ``weights`` are those of the plan whose stages share out the blocks; empty where every rank has
    blocks of all of them.
    """

    mode: Literal["cast", "full", "modulation", "sharded", "offload"] = "full"
    tensor_degree: int = 1
    grid: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether a rank has parts of blocks' weights."""
        return self.shares_modulation or self.mode == "sharded" or self.tensor_degree > 1

    @property
    def shares_modulation(self) -> bool:
        """Whether it has a part of what modulates the blocks, and all else on its card."""
        return self.mode in ("cast", "modulation")

    @property
    def is_whole(self) -> bool:
        """Whether every rank has all weights on its card."""
        return self == Residence()


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
    transfer_dtype: Literal["exact", "fp8", "int8"] = "exact"


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
    it already needs neither. ``state`` is made by ``host/reading/weight_states.py`` and ``key``
    names its contents. ``room_bytes`` is what other models may take on the device beside this one,
    if that is limited. With ``verify`` the reply has a digest of every weight in use. ``look`` are
    seed and parts of the ``Look`` (``fingerprint.py``) at the stored weights that the reply's
    fingerprint is made by; empty for none.
    """

    request: int
    model: int
    source: ModelSource | None
    tensors: Tree
    state: Tree
    key: str
    residence: Residence
    room_bytes: int | None
    verify: bool
    look: list[int] = field(default_factory=list)


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


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of the diffusion model.

    ``arguments`` is the tree of ``Flux._forward``'s keyword arguments; ``control`` in it
    holds recipes for residuals (``worker/shard/residuals.py``). The ranks that own a part
    of the batch write it to the slot ``result``. ``pipeline`` is None but for PipeFusion
    (``worker/pipefusion/sequence.py``). ``working_bytes`` is what the call takes on a device beside
    the weights, for a look whether there is room; 0 to make it at once. ``patches`` are those of
    nodes (``worker/shard/node_patches.py``), or None. ``compiled`` says which blocks the user has
    compiled, and how (``host/reading/compiled.py``), or is None. With ``overlaps`` GPUs compute
    while tokens are on their way, and with ``captures`` by CUDA graphs, where they can.
    """

    request: int
    model: int
    grid: list[int]
    weights: list[int]
    arguments: Tree
    result: int
    pipeline: Tree = None
    working_bytes: int = 0
    patches: Tree = None
    compiled: Tree = None
    overlaps: bool = True
    captures: bool = False


@dataclass(frozen=True, slots=True)
class Control:
    """One call of a ControlNet, whose residuals stay with the ranks under the number ``call``.

    ``working_bytes`` as in ``Forward``.
    """

    request: int
    model: int
    call: int
    grid: list[int]
    weights: list[int]
    arguments: Tree
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunBlock:
    """One block of a forward that runs in the host.

    ``counts`` are text, image and reference tokens of all ranks. ``arguments`` are those of the
    block's ``forward``; tokens among them are whole, or recipes of what the ranks keep
    (``worker/shard/blocks.py``). The ranks keep what it returns under the numbers ``keep``. The
    first one of a step has ``working_bytes``, as in ``Forward``.
    """

    request: int
    model: int
    block: str
    grid: list[int]
    weights: list[int]
    counts: list[int]
    arguments: Tree
    patches: Tree
    keep: list[int]
    is_first: bool
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fetch:
    """Write all tokens of a recipe to the slot ``result``, in ComfyUI's order."""

    request: int
    model: int
    grid: list[int]
    weights: list[int]
    tokens: Tree
    stream: str
    counts: list[int]
    result: int


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode a latent; each rank writes its lines of the picture to the slot ``result``.

    With ``owners`` the latent is a list of tiles, and this is the rank of each: it writes the whole
    picture of that tile, behind those of the tiles before.

    ``decoder`` are the arguments of ComfyUI's class (``wire/decoders.py``), ``weights`` the places
    of its weights by name, and ``key`` names all of that. ``attributes`` are the host's.
    ``working_bytes`` as in ``Forward``.
    """

    request: int
    key: str
    decoder: dict[str, Tree]
    weights: dict[str, Tree]
    attributes: dict[str, dict[str, str]]
    latent: Tree
    result: int
    owners: list[int] = field(default_factory=list)
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Free:
    """Give back the memory of keys and values that PipeFusion kept for these ``streams``."""

    request: int
    streams: list[int]


@dataclass(frozen=True, slots=True)
class Forget:
    """What the host does not refer to any more.

    ``calls`` of ControlNets, whose residuals the ranks keep; ``objects`` of nodes' patches;
    ``tokens`` between blocks.
    """

    calls: list[int]
    objects: list[int]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Follow:
    """Settings of the host: torch's (``torch_settings.py``), and ComfyUI's plain options."""

    torch: dict[str, Tree]
    arguments: dict[str, Tree]


@dataclass(frozen=True, slots=True)
class Reach:
    """Say what a model's code reaches. Classes of its modules as ``module:path``."""

    request: int
    in_blocks: list[str]
    around: list[str]


FromHost: TypeAlias = (
    Start
    | Map
    | Unmap
    | Load
    | Unload
    | GiveWay
    | Drop
    | Stop
    | Forward
    | Control
    | RunBlock
    | Fetch
    | Decode
    | Free
    | Forget
    | Follow
    | Reach
)
