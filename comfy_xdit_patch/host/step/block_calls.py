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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from comfy_xdit_patch.errors import AroundBlocksError, DeclinedError, TheirError
from comfy_xdit_patch.host.boundary import is_interrupt
from comfy_xdit_patch.host.pool.crew import Crew, Room, Turn
from comfy_xdit_patch.host.pool.exchange import Poll
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
from comfy_xdit_patch.wire.messages.replies import Declined, Fetched, Ran, short
from comfy_xdit_patch.wire.messages.requests import Fetch, RunBlock, Tree
from comfy_xdit_patch.wire.own_attribute import own_attribute

EMBEDDERS = {"img_in": "image", "txt_in": "text"}
"""What the first block is given: ComfyUI's blocks change it in place, and so must ours."""


TOKENS = {"img": "image", "txt": "text", "x": "joint"}
CONSTANT = ("pe", "attn_mask")
"""Arguments that are the same tensor for all blocks of a step."""


@dataclass(frozen=True, slots=True)
class Driven:
    """A model's output, how many blocks ran on the ranks, and what each rank computed in them."""

    out: torch.Tensor
    num_blocks: int
    busy_s: tuple[float, ...]


class DrivenForward:
    """The workers, as the blocks of a model whose forward runs here."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._numbers = itertools.count(1)

    def run(
        self,
        crew: Crew,
        flux: Any,
        compute: Callable[[], torch.Tensor],
        *,
        model: int,
        plan: ParallelPlan,
        num_image_tokens: int,
        patches: Tree,
        carry_options: Callable[[Mapping[str, Any]], dict[str, Any]],
        poll: Poll,
        room: Room | None = None,
    ) -> Driven:
        """Run ComfyUI's own forward with the blocks on all ranks.

        Args:
            model: number of the model that every rank holds.
            num_image_tokens: of the latent; more image tokens are references.
            patches: those that blocks apply, for the workers, or None.
            carry_options: what such patches may read of a block's ``transformer_options``.
            room: for a look whether a card has it; None to compute at once.

        Raises:
            TheirError: the forward raised before it was given anything of ours.
            AroundBlocksError: it raised later, which it may not do without us.
            CallRaisedError: a block raised, in every rank.
            CardsFullError: there is no room on a card.
            WorkerError: the workers are lost.
            PlanError: there are fewer tokens than ranks.
        """
        step = DrivenStep(
            crew,
            self._totals,
            flux=flux,
            model=model,
            plan=plan,
            num_image_tokens=num_image_tokens,
            patches=patches,
            carry_options=carry_options,
            poll=poll,
            room=room,
            numbers=self._numbers,
        )
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
        return Driven(out, step.num_blocks, tuple(step.busy_s))


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
        totals: Totals,
        *,
        flux: Any,
        model: int,
        plan: ParallelPlan,
        num_image_tokens: int,
        patches: Tree,
        carry_options: Callable[[Mapping[str, Any]], dict[str, Any]],
        poll: Poll,
        room: Room | None,
        numbers: Iterator[int],
    ) -> None:
        self._crew = crew
        self._totals = totals
        self._flux = flux
        self._model = model
        self._plan = plan
        self._num_image_tokens = num_image_tokens
        self._patches = patches
        self._carry_options = carry_options
        self._poll = poll
        self._room = room
        self._numbers = numbers
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
        tree: dict[str, Any] = {}
        constants: dict[str, tuple[torch.Tensor, Tree]] = {}
        slots = self._crew.slots
        with self._crew.turn(self._poll) as turn:
            written = slots.bytes_written
            for key, value in arguments.items():
                if key in tokens:
                    tree[key] = self._tokens(turn, key, value, counts)
                elif key in CONSTANT and isinstance(value, torch.Tensor):
                    known, place = self._constants.get(key, (None, None))
                    tree[key] = place if known is value else turn.put(f"driven.{key}", value)
                    constants[key] = value, tree[key]
                elif key not in ("self", "transformer_options"):
                    tree[key] = turn.put(f"driven.{key}", value)
            if self._patches is not None:
                options = self._carry_options(arguments.get("transformer_options") or {})
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
        for rank, reply in enumerate(replies):
            if isinstance(reply, Declined):
                raise DeclinedError(short(reply.reason))
            assert isinstance(reply, Ran)
            self._totals.num_forwards[rank] = reply.num_forwards
            self._totals.step_seconds[rank] = reply.seconds
            self.busy_s[rank] += reply.busy_seconds
            self._totals.busy_seconds[rank] = self.busy_s[rank]
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
        results = []
        for (key, value), number in zip(tokens.items(), keep, strict=True):
            recipe = ("kept", Kept(number, self._crew.gone.tokens.append))
            if isinstance(value, RemoteTokens) and value.parent is None:
                value.move(recipe, counts, self._fetch, self._plan.weights)
                results.append(value)
            else:
                results.append(
                    RemoteTokens.make(
                        TOKENS[key],
                        shape=value.shape,
                        like=value,
                        recipe=recipe,
                        counts=counts,
                        fetch=self._fetch,
                        weights=self._plan.weights,
                    )
                )
        return tuple(results) if len(results) > 1 else results[0]

    def _counts(self, tokens: Mapping[str, torch.Tensor]) -> Counts:
        if "txt" in tokens:
            self._num_text_tokens = tokens["txt"].shape[SEQUENCE_DIM]
        visual = tokens["img" if "img" in tokens else "x"].shape[SEQUENCE_DIM]
        if "x" in tokens:
            visual -= self._num_text_tokens
        num_image = min(visual, self._num_image_tokens)
        counts = (self._num_text_tokens, num_image, visual - num_image)
        self._plan.shares_of_counts(0, counts, num_heads=self._flux.num_heads)  # or PlanError
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
        with self._crew.turn(self._poll) as turn:
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
            shared = result.view(tokens.dtype, tuple(tokens.shape))
            out = torch.empty_like(shared, device=tokens.device).copy_(shared)
        for reply in replies:
            assert isinstance(reply, Fetched)
            self._totals.bytes_between_ranks += reply.bytes_between_ranks
        self._totals.bytes_from_workers += tokens.numel() * tokens.dtype.itemsize
        return out
