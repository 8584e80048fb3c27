"""Run a forward here while its blocks run on the workers.

Runs in: host process.

For what nodes put around the blocks: a ``forward_orig`` of their own, a function in a block's
place, tokens added before the first block, hooks. All of it runs here, with the objects and the
state that the node gave it, exactly as without us; only ``forward`` of each block is ours while
this lasts, and asks the ranks.
"""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from comfy_xdit_patch.attributes import own_attribute
from comfy_xdit_patch.errors import NodeError, Refusal, Scope, XditError
from comfy_xdit_patch.observability.status import Totals
from comfy_xdit_patch.patching.boundary import is_interrupt
from comfy_xdit_patch.patching.driven_step import DrivenStep
from comfy_xdit_patch.patching.remote_tokens import RemoteTokens
from comfy_xdit_patch.patching.wire import Wire
from comfy_xdit_patch.planning.eligibility import BLOCK_LISTS
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
        self._has_given = False
        """Whether the node's code has tokens of ours in its hands."""

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
    ) -> tuple[torch.Tensor, int] | Refusal:
        """Run ComfyUI's own forward with the blocks on all ranks.

        Args:
            model: number of the model that every rank holds.
            num_image_tokens: of the latent; more image tokens are references.
            patches: those that blocks apply, for the workers, or None.
            carry_options: what such patches may read of a block's ``transformer_options``.

        Returns:
            The model's output, and how many blocks ran on the ranks; or a refusal if a node's code
            failed on what it was given for tokens.

        Raises:
            NodeError: a node's code failed before it was given anything of ours.
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
                    marked = self._marked(embed.forward, stream)
                    stack.enter_context(own_attribute(embed, "forward", marked))
            self._has_given = False
            out = self._compute(compute, step)
        return out if isinstance(out, Refusal) else (out, step.num_blocks)

    def _compute(
        self, compute: Callable[[], torch.Tensor], step: DrivenStep
    ) -> torch.Tensor | Refusal:
        """Run a node's code: its errors are its own, and ours are not for it to handle."""
        try:
            out = compute()
            if isinstance(out, RemoteTokens):
                out = out.numbers()
        except Exception as error:
            if step.fault is None and not isinstance(error, XditError) and not is_interrupt(error):
                if not (self._has_given or step.num_blocks):
                    raise NodeError(error) from error
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{os.path.basename(where.filename)}, {where.name}"
                return Refusal(f"{type(error).__name__} around the blocks, in {place}", Scope.STEP)
            if step.fault is None:
                raise
        if step.fault is not None:
            raise step.fault
        return out

    def _marked(
        self, embed: Callable[..., torch.Tensor], stream: str
    ) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = embed(*args, **kwargs)
            self._has_given = True
            return RemoteTokens.make(stream, shape=out.shape, like=out, here=out)

        return forward
