"""Run a forward here while its blocks run on the workers.

Runs in: host process.

For what nodes put around the blocks: a ``forward_orig`` of their own, a function in a block's
place, tokens added before the first block, hooks. All of it runs here, with the objects and the
state that the node gave it, exactly as without us; only ``forward`` of each block is ours while
this lasts, and asks the ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from comfy_xdit_patch.attributes import own_attribute
from comfy_xdit_patch.errors import AroundBlocksError, TheirError
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.boundary import is_interrupt
from comfy_xdit_patch.patching.driven_step import DrivenStep
from comfy_xdit_patch.patching.remote_tokens import RemoteTokens
from comfy_xdit_patch.patching.wire import Room, Wire
from comfy_xdit_patch.planning.family import BLOCK_LISTS
from comfy_xdit_patch.planning.plan import ParallelPlan
from comfy_xdit_patch.transport.calls import Tree
from comfy_xdit_patch.workers.exchange import Poll

EMBEDDERS = {"img_in": "image", "txt_in": "text"}
"""What the first block is given: ComfyUI's blocks change it in place, and so must ours."""


class DrivenForward:
    """The workers, as the blocks of a model whose forward runs here."""

    def __init__(self, wire: Wire, totals: Totals) -> None:
        self._wire = wire
        self._totals = totals
        self._numbers = itertools.count(1)
        self._gone: list[int] = []

    def run(
        self,
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
    ) -> tuple[torch.Tensor, int]:
        """Run ComfyUI's own forward with the blocks on all ranks.

        Args:
            model: number of the model that every rank holds.
            num_image_tokens: of the latent; more image tokens are references.
            patches: those that blocks apply, for the workers, or None.
            carry_options: what such patches may read of a block's ``transformer_options``.
            room: for a look whether a card has it; None to compute at once.

        Returns:
            The model's output, and how many blocks ran on the ranks.

        Raises:
            TheirError: the forward raised before it was given anything of ours.
            AroundBlocksError: it raised later, which it may not do without us.
            CallRaisedError: a block raised, in every rank.
            CardsFullError: there is no room on a card.
            WorkerError: the workers are lost.
            PlanError: there are fewer tokens than ranks.
        """
        step = DrivenStep(
            self._wire,
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
            gone=self._gone,
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
        return out, step.num_blocks


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
