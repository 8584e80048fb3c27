"""Where the weights lie: whole on every card, sharded, in CPU memory, or nowhere.

Runs in: host, worker and the doctor's process. Pure arithmetic: bytes in, a plan or a refusal out.

Per card, with N ranks, S tokens of a rank's rows, D features and e bytes for each value:

    weights       full: all; modulation: all, but of the blocks' modulation 1/N;
                  cast: the same, in the dtype that they are multiplied in;
                  sharded: 1/N of the blocks, all else, two windows of one block;
                  offload: all that is not in blocks, two blocks under way
    activations   (18 + 6) * S/N * D * e, and S * D * e of embedded tokens before they are cut
    beside them   what CUDA, NCCL, the allocator and ComfyUI's own process take
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from comfy_xdit_patch.errors import Refusal
from comfy_xdit_patch.planning.pipeline import kept_bytes, most_blocks
from comfy_xdit_patch.planning.plan import ParallelPlan, Workload

GIB = 1 << 30
MIB = 1 << 20

CUDA_CONTEXT_BYTES = 600 * MIB
"""One process's context with cuBLAS and the attention kernels: 0.4 to 0.6 GB are reported."""
NCCL_GROUP_BYTES = 256 * MIB
"""One communicator, until ranks have measured theirs. NCCL's documentation: 4 MiB (NCCL_BUFFSIZE)
for each channel, peer and direction; 16 channels, 2 directions and the rest are 0.2 GiB."""
RESERVED_BYTES = 500 * MIB
"""What ComfyUI itself leaves free on Linux on cards above 15 GiB (``EXTRA_RESERVED_VRAM``)."""
ALLOCATOR_SLACK = 0.10
"""Part of the activations that torch's allocator holds and cannot use. A margin, not measured."""
BLOCK_VALUES_PER_TOKEN = 18
"""Live values for each token at the peak of a FLUX block, in units of its features: counted from
ComfyUI's single block; 0.51 GB for 4608 tokens of 3072 features in bf16."""
EXCHANGE_VALUES_PER_TOKEN = 6
"""Send and receive buffers of q, k and v in one all-to-all. With the 18 above this is 1.33 / N of
one GPU's peak; tests/parallel/test_family.py measures at most 1.4 / N on CPU ranks."""

NUM_WINDOWS = 2
"""Blocks in whole form at a time: the one that computes, and the one that is gathered or copied."""

Mode = Literal["cast", "full", "modulation", "staged", "sharded", "offload", "tensor"]
MODES: tuple[Mode, ...] = ("cast", "full", "modulation", "sharded", "offload")
ON_CARDS: frozenset[Mode] = frozenset({"cast", "full", "modulation", "staged", "tensor"})
"""Modes in which a rank has on its card all weights that it computes with."""
PIPELINE_MODES: tuple[Mode, ...] = ("staged", "offload")
"""A shard is gathered by all ranks at once, and the stages of a pipeline run different blocks."""
MODE_NAMES = {
    "cast": "weights cast once, modulation shared over the ranks, all else on every card",
    "full": "all weights on every card",
    "modulation": "modulation shared over the ranks, all else on every card",
    "staged": "each stage's weights on its cards",
    "sharded": "weights sharded over the ranks",
    "offload": "weights in CPU memory",
    "tensor": "blocks cut by heads and columns",
}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A diffusion model's weights in bytes, as they are stored."""

    total_bytes: int
    largest_block_bytes: int
    outside_blocks_bytes: int
    cast_bytes: int = 0
    """The largest weight in compute dtype, where that is not the stored dtype: fp8 weights are
    cast at every use, one at a time."""
    modulation_bytes: int = 0
    """Of the linears that modulate the blocks, where ranks can share them: one row for each image
    goes through them, whatever the number of tokens."""
    as_cast: ModelSizes | None = None
    """With the weights that are cast for each call as they are multiplied, where there are some
    and ranks can share the modulation."""

    def part(self, num_blocks: int, of_blocks: int) -> ModelSizes:
        """Return the sizes of a model that has some of the blocks."""
        blocks = self.total_bytes - self.outside_blocks_bytes
        some = -(-blocks * num_blocks // of_blocks)
        return replace(self, total_bytes=self.outside_blocks_bytes + some)


@dataclass(frozen=True, slots=True)
class TokenLoad:
    """The largest call that has to fit, on the rank that has most of it."""

    num_tokens: int
    """Of a whole row."""
    local_tokens: int
    """Of a row, on this rank."""
    hidden_size: int
    num_rows: int = 1
    """Of the batch, on this rank."""
    bytes_per_value: int = 2
    kept_bytes: int = 0
    """Keys and values that a rank keeps from one step to the next (PipeFusion)."""
    num_groups: int = 1
    """Communicators of a rank (``Degrees.num_communicators``)."""


@dataclass(frozen=True, slots=True)
class Card:
    """One rank's device memory.

    ``free_bytes`` is what other programs leave. What ComfyUI's own process holds counts as free:
    it gives way while the workers compute, but for its CUDA context. ``group_bytes`` is what one
    communicator takes.
    """

    total_bytes: int
    free_bytes: int
    has_host: bool = False
    group_bytes: int = NCCL_GROUP_BYTES


@dataclass(frozen=True, slots=True)
class Cost:
    """One line of the arithmetic. ``is_working``: taken by each call, and given back after it."""

    what: str
    num_bytes: int
    is_working: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """What one mode takes on the card where it is tightest."""

    mode: Mode
    rank: int
    card: Card
    costs: tuple[Cost, ...]

    @property
    def num_bytes(self) -> int:
        return sum(cost.num_bytes for cost in self.costs)

    @property
    def working_bytes(self) -> int:
        """What a call takes beside what is there before it."""
        return sum(cost.num_bytes for cost in self.costs if cost.is_working)

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.card.free_bytes

    @property
    def text(self) -> str:
        """E.g. ``weights sharded over the ranks: 14.2 of 24.0 GiB on rank 0``."""
        return (
            f"{MODE_NAMES[self.mode]}: {gib(self.num_bytes)} of {gib(self.card.free_bytes)} GiB "
            f"on rank {self.rank}"
        )


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """The mode that was chosen, and what it and those before it need."""

    needs: tuple[Need, ...]
    """Modes in the order in which they were tried; all but the last do not fit."""

    @property
    def mode(self) -> Mode:
        return self.needs[-1].mode

    @property
    def is_on_cards(self) -> bool:
        """Whether every rank has on its card all weights that it computes with."""
        return self.mode in ON_CARDS

    def lines(self) -> list[str]:
        """The arithmetic as text."""
        *turned_down, chosen = self.needs
        return [
            chosen.text,
            *(f"  {gib(cost.num_bytes):>5}  {cost.what}" for cost in chosen.costs),
            *(f"  does not fit: {need.text}" for need in turned_down),
        ]


def token_load(
    plan: ParallelPlan,
    workload: Workload,
    *,
    num_blocks: int,
    hidden_size: int,
    bytes_per_value: int = 2,
) -> TokenLoad:
    """Return what a plan leaves of a call to the rank that has most of it.

    Raises:
        PlanError: the call has fewer tokens than the plan needs.
    """
    shares = [plan.shares_of_call(rank, workload) for rank in plan.first_ranks]
    rows = [plan.batch_rows(rank, workload.batch_size) for rank in plan.first_ranks]
    token_bytes = hidden_size * bytes_per_value
    return TokenLoad(
        num_tokens=workload.num_tokens,
        local_tokens=max(max(of_group.joint) for of_group in shares),
        hidden_size=hidden_size,
        num_rows=max(end - start for start, end in rows),
        bytes_per_value=bytes_per_value,
        kept_bytes=kept_bytes(plan, workload, num_blocks=num_blocks, token_bytes=token_bytes),
        num_groups=plan.num_communicators,
    )


def plan_residency(
    plan: ParallelPlan,
    model: ModelSizes,
    load: TokenLoad,
    *,
    num_blocks: int,
    cards: tuple[Card, ...],
    first: Mode = "full",
    may_cast: bool = True,
) -> ResidencyPlan | Refusal:
    """Take the first mode that fits on every card: of ``MODES``, as a rule.

    In this order because of speed: a whole copy moves nothing, shared modulation moves its outputs
    once a step (2 MB for FLUX.1), a gather moves the blocks over the links between cards, offload
    moves them over the bus to CPU memory. The stages of a pipeline have blocks of their own instead
    of all, and blocks that are cut by heads and columns lie in no other way. Weights that are cast
    once take the room of ComfyUI's other models, so it is the user who asks for them.

    Args:
        model: the whole model's sizes.
        load: the plan's own, by ``token_load``. It counts as if no activation were cut by heads
            and columns, which they are.
        num_blocks: how many the model has.
        first: the user wants this mode or a later one; of ``modulation``, with weights cast once if
            they fit so.
        may_cast: weights may be cast once.
    """
    modes: tuple[Mode, ...] = MODES[1:] if len(cards) > 1 else ("full", "offload")
    if not model.modulation_bytes:
        modes = tuple(mode for mode in modes if mode != "modulation")
    if plan.tensor > 1:
        modes, model = ("tensor",), model.part(1, plan.tensor)
    elif plan.pipefusion > 1:
        modes, model = PIPELINE_MODES, model.part(most_blocks(plan, num_blocks), num_blocks)
    modes = modes[modes.index(first) if first in modes else 0 :]
    if may_cast and model.as_cast is not None and first == modes[0] == "modulation":
        modes = ("cast", *modes)
    tried: list[Need] = []
    for mode in modes:
        tried.append(need_of(mode, model, load, cards=cards))
        if tried[-1].fits:
            return ResidencyPlan(tuple(tried))
    return Refusal(
        f"the model does not fit on {len(cards)} cards ({'; '.join(need.text for need in tried)})"
    )


def need_of(mode: Mode, model: ModelSizes, load: TokenLoad, *, cards: tuple[Card, ...]) -> Need:
    """What one mode takes, on the card where it is tightest."""
    if mode == "cast":
        assert model.as_cast is not None, "the model has nothing to cast once"
        model = model.as_cast
    needs = [
        Need(mode, rank, card, _costs(mode, model, load, card, len(cards)))
        for rank, card in enumerate(cards)
    ]
    return max(needs, key=lambda need: need.num_bytes - need.card.free_bytes)


def _costs(
    mode: Mode, model: ModelSizes, load: TokenLoad, card: Card, num_ranks: int
) -> tuple[Cost, ...]:
    whole, local = load.num_tokens, load.local_tokens
    values = BLOCK_VALUES_PER_TOKEN + (EXCHANGE_VALUES_PER_TOKEN if num_ranks > 1 else 0)
    embedded = whole if num_ranks > 1 else 0  # the whole, kept beside the shard that is cut from it
    token_bytes = load.num_rows * load.hidden_size * load.bytes_per_value
    activations = (local * values + embedded) * token_bytes + model.cast_bytes
    costs = [
        *_weights(mode, model, num_ranks),
        Cost(f"activations, {local} of {whole} tokens", activations, is_working=True),
        Cost("allocator slack", int(activations * ALLOCATOR_SLACK), is_working=True),
        Cost("CUDA context", CUDA_CONTEXT_BYTES),
        Cost("reserve", RESERVED_BYTES),
    ]
    if num_ranks > 1:
        # Gathers have a group of their own, for NCCL runs the collectives of one in turn.
        num_groups = load.num_groups + (mode == "sharded")
        costs.append(Cost(f"NCCL, {num_groups} group(s)", num_groups * card.group_bytes))
    if load.kept_bytes:
        costs.append(Cost("keys and values of the step before", load.kept_bytes))
    if card.has_host:
        costs.append(Cost("CUDA context of ComfyUI's own process", CUDA_CONTEXT_BYTES))
    return tuple(costs)


def _weights(mode: Mode, model: ModelSizes, num_ranks: int) -> list[Cost]:
    if mode in ("full", "staged", "tensor"):
        return [Cost("weights", model.total_bytes)]
    if mode in ("cast", "modulation"):
        shared = model.modulation_bytes
        return [
            Cost("weights but for the blocks' modulation", model.total_bytes - shared),
            Cost(f"1/{num_ranks} of the blocks' modulation", -(-shared // num_ranks)),
        ]
    blocks = model.total_bytes - model.outside_blocks_bytes
    outside = Cost("weights outside of the blocks", model.outside_blocks_bytes)
    window = Cost("two blocks in whole form", NUM_WINDOWS * model.largest_block_bytes)
    if mode == "offload":
        return [outside, window]
    return [Cost(f"1/{num_ranks} of the blocks' weights", -(-blocks // num_ranks)), outside, window]


def gib(num_bytes: int) -> str:
    """Bytes as GiB with one decimal."""
    return f"{num_bytes / GIB:.1f}"
