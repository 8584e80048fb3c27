"""Run a forward here while its blocks run on the workers.

Runs in: host process.

For what nodes put around the blocks: a ``forward_orig`` of their own, a function in a block's
place, tokens added before the first block, hooks. All of it runs here, with the objects and the
state that the node gave it, exactly as without us; only ``forward`` of each block is ours while
this lasts, and asks the ranks.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from comfy_xdit_patch.errors import AroundBlocksError, DeclinedError, TheirError
from comfy_xdit_patch.host.boundary import is_interrupt
from comfy_xdit_patch.host.call import Call
from comfy_xdit_patch.host.pool.crew import Crew, Room, Turn
from comfy_xdit_patch.host.reading.node_patches import other_options
from comfy_xdit_patch.host.step.outcome import Computed
from comfy_xdit_patch.host.step.tokens_there import (
    Counts,
    Kept,
    RemoteTokens,
    encode,
)
from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.planning.sequence_shares import SEQUENCE_DIM
from comfy_xdit_patch.report.status import Totals
from comfy_xdit_patch.wire.messages.replies import Declined, Fetched, Ran, Reply, short
from comfy_xdit_patch.wire.messages.requests import Fetch, RunBlock, Tree
from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.wire.tensors import is_finite

EMBEDDERS = {"img_in": "image", "txt_in": "text"}
"""What the first block is given: ComfyUI's blocks change it in place, and so must ours."""


TOKENS = {"img": "image", "txt": "text", "x": "joint"}
CONSTANT = ("pe", "attn_mask")
"""Arguments that are the same tensor for all blocks of a step."""


class DrivenForward:
    """The workers, as the blocks of a model whose forward runs here."""

    _numbers = itertools.count(1)
    """Of this process: ranks, and what they keep for a node, outlive a change of settings."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def run(
        self,
        crew: Crew,
        model: int,
        call: Call,
        plan: ParallelPlan,
        compute: Callable[[], torch.Tensor],
        *,
        room: Room | None = None,
    ) -> Computed:
        """Run ComfyUI's own forward with the blocks on all ranks.

        Args:
            model: number of the model that every rank holds.
            compute: ComfyUI's own forward.
            room: for a look whether a card has it; None to compute at once.

        Raises:
            TheirError: the forward raised before it was given anything of ours.
            AroundBlocksError: it raised later, which it may not do without us.
            CallRaisedError: a block raised, in every rank.
            CardsFullError: there is no room on a card.
            WorkerError: the workers are lost.
            PlanError: there are fewer tokens than ranks.
        """
        step = DrivenStep(crew, model, call, plan, room, totals=self._totals, numbers=self._numbers)
        flux = call.module
        with ExitStack() as stack:
            for list_name in BLOCK_LISTS:
                for number, block in enumerate(getattr(flux, list_name)):
                    stub = step.stub(block, f"{list_name}.{number}")
                    stack.enter_context(own_attribute(block, "forward", stub))
            for name, stream in EMBEDDERS.items():
                embed = getattr(flux, name, None)
                if isinstance(embed, torch.nn.Module):
                    marked = step.marked(embed.forward, stream)
                    stack.enter_context(own_attribute(embed, "forward", marked))
            out = _computed(compute, step)
            if isinstance(out, RemoteTokens):
                out = out.numbers()
        return Computed(
            out,
            tuple(step.busy_s),
            is_finite=is_finite(out),
            is_empty=step.num_blocks == 0,
        )


def _computed(compute: Callable[[], torch.Tensor], step: DrivenStep) -> torch.Tensor:
    """Run the forward, and tell whose an exception is that comes out of it."""
    try:
        out = compute()
    except Exception as error:
        if is_interrupt(error) or error is step.error:
            raise
        if step.error is None and not step.has_given:
            raise TheirError(error) from error
        if step.error is None:
            raise AroundBlocksError(f"{type(error).__name__}: {error}") from error
    # A node that goes on after an exception of ours has made its result of something else.
    if step.error is not None:
        raise step.error
    return out


class DrivenStep:
    """One step: its blocks, and the tokens between them."""

    def __init__(
        self,
        crew: Crew,
        model: int,
        call: Call,
        plan: ParallelPlan,
        room: Room | None,
        *,
        totals: Totals,
        numbers: Iterator[int],
    ) -> None:
        """Begin it; ``numbers`` are those of what ranks keep."""
        self._crew = crew
        self._model = model
        self._call = call
        self._plan = plan
        self._room = room
        self._totals = totals
        self._numbers = numbers
        self._patches = call.carried.in_blocks()
        self._num_text_tokens = 0
        self._constants: dict[str, tuple[torch.Tensor, Tree]] = {}
        self.num_blocks = 0
        self.has_given = False
        """Whether anything of ours was given to the forward, which may stumble over it."""
        self.error: BaseException | None = None
        """What was raised in ours: it is not the forward's own, whatever becomes of it there."""
        self.busy_s = [0.0] * crew.world_size
        """What each rank computed in the blocks."""

    def stub(self, block: Any, name: str) -> Callable[..., Any]:
        """Return what stands in for a block's ``forward``."""
        signature = inspect.signature(type(block).forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.has_given = True
            arguments = signature.bind(block, *args, **kwargs).arguments
            with self._noting_errors():
                return self._block(name, arguments)

        return forward

    def marked(
        self, embed: Callable[..., torch.Tensor], stream: str
    ) -> Callable[..., torch.Tensor]:
        """Return what stands in for the ``forward`` of an embedder."""

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = embed(*args, **kwargs)
            self.has_given = True
            return RemoteTokens.make(stream, shape=out.shape, like=out, here=out)

        return forward

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.error = error
            raise

    def _block(self, name: str, arguments: Mapping[str, Any]) -> Any:
        tokens = {key: arguments[key] for key in TOKENS if key in arguments}
        counts = self._counts(tokens)
        keep = [next(self._numbers) for _ in tokens]
        constants: dict[str, tuple[torch.Tensor, Tree]] = {}
        slots = self._crew.slots
        with self._crew.turn(self._call.poll) as turn:
            written = slots.bytes_written
            tree = {
                key: self._placed(turn, key, value, counts, constants)
                for key, value in arguments.items()
                if key not in ("self", "transformer_options")
            }
            if self._patches is not None:
                options = other_options(arguments.get("transformer_options") or {})
                self._patches["options"] = turn.put("driven.options", options)
            replies = turn.compute(
                RunBlock(
                    request=turn.number,
                    model=self._model,
                    block=name,
                    grid=list(self._plan.grid),
                    weights=list(self._plan.weights),
                    counts=list(counts),
                    arguments=tree,
                    patches=self._patches,
                    keep=keep,
                    is_first=self.num_blocks == 0,
                ),
                room=self._room if self.num_blocks == 0 else None,
            )
        self._constants |= constants
        self._totals.bytes_to_workers += slots.bytes_written - written
        self.num_blocks += 1
        self._count(replies)
        results = [
            self._kept(value, TOKENS[key], number, counts)
            for (key, value), number in zip(tokens.items(), keep, strict=True)
        ]
        return tuple(results) if len(results) > 1 else results[0]

    def _placed(
        self,
        turn: Turn,
        key: str,
        value: Any,
        counts: Counts,
        constants: dict[str, tuple[torch.Tensor, Tree]],
    ) -> Tree:
        """Put an argument of a block into slots; one of ``CONSTANT`` is put there once."""
        if key in TOKENS:
            return self._tokens(turn, key, value, counts)
        known, place = self._constants.get(key, (None, None))
        if known is None or known is not value:
            place = turn.put(f"driven.{key}", value)
        if key in CONSTANT and isinstance(value, torch.Tensor):
            constants[key] = value, place
        return place

    def _count(self, replies: Sequence[Reply]) -> None:
        for rank, reply in enumerate(replies):
            if isinstance(reply, Declined):
                raise DeclinedError(short(reply.reason))
            assert isinstance(reply, Ran)
            self.busy_s[rank] += reply.busy_seconds
            self._totals.ran(
                rank,
                num_forwards=reply.num_forwards,
                step_s=reply.seconds,
                busy_s=reply.busy_seconds,
                of_call_s=self.busy_s[rank],
            )
            self._totals.bytes_between_ranks += reply.bytes_between_ranks

    def _kept(self, value: torch.Tensor, stream: str, number: int, counts: Counts) -> RemoteTokens:
        """Return the tokens that a block made of these, which ranks keep by this number."""
        recipe = ("kept", Kept(number, self._crew.gone.tokens.append))
        if isinstance(value, RemoteTokens) and value.parent is None:
            value.move(recipe, counts, self._fetch, self._plan.weights)
            return value
        return RemoteTokens.make(
            stream,
            shape=value.shape,
            like=value,
            recipe=recipe,
            counts=counts,
            fetch=self._fetch,
            weights=self._plan.weights,
        )

    def _counts(self, tokens: Mapping[str, torch.Tensor]) -> Counts:
        if "txt" in tokens:
            self._num_text_tokens = tokens["txt"].shape[SEQUENCE_DIM]
        visual = tokens["img" if "img" in tokens else "x"].shape[SEQUENCE_DIM]
        if "x" in tokens:
            visual -= self._num_text_tokens
        workload = self._call.workload
        num_image = min(visual, workload.num_image_tokens)
        counts = (self._num_text_tokens, num_image, visual - num_image)
        self._plan.shares_of_counts(
            0, counts, num_heads=self._call.workload.num_heads
        )  # or PlanError
        return counts

    def _tokens(self, turn: Turn, key: str, value: torch.Tensor, counts: Counts) -> Tree:
        if isinstance(value, RemoteTokens):
            if self._is_there(value, counts):
                assert value.recipe is not None
                return encode(value.recipe)
            value = value.numbers()
        return ["whole", turn.put(f"driven.{key}", value)]

    def _is_there(self, value: RemoteTokens, counts: Counts) -> bool:
        is_shared_so = value.weights == self._plan.weights  # and not as in an earlier step
        return value.recipe is not None and value.counts == counts and is_shared_so

    def _fetch(self, tokens: RemoteTokens) -> torch.Tensor:
        with self._noting_errors():
            return self._fetched(tokens)

    def _fetched(self, tokens: RemoteTokens) -> torch.Tensor:
        assert tokens.recipe is not None
        recipe = encode(tokens.recipe)
        slots = self._crew.slots
        with self._crew.turn(self._call.poll) as turn:
            result = slots.result_slot(tokens.numel() * tokens.dtype.itemsize)
            replies = turn.ask(
                Fetch(
                    request=turn.number,
                    model=self._model,
                    grid=list(self._plan.grid),
                    weights=list(self._plan.weights),
                    tokens=recipe,
                    stream=tokens.stream,
                    counts=list(tokens.counts),
                    result=result.number,
                )
            )
            out = result.handed_out(tokens.dtype, tuple(tokens.shape), tokens.device)
        for reply in replies:
            assert isinstance(reply, Fetched)
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
        self._totals.bytes_from_workers += tokens.numel() * tokens.dtype.itemsize
        return out
