"""The blocks of one pipeline stage, and the tokens that cross its two ends.

Runs in: worker process.

Dimension letters in this file
    B  batch
    L  local sequence: [text | image | references] of this rank's shard of a patch
    D  features

ComfyUI's ``forward_orig`` runs as it is. While it does, the ``forward`` of each block is ours:

    a block of the stage      runs; its first block is given what the stage before has sent
    the first block after it  sends on its input, which is what the next stage needs: ControlNets
                              add to tokens between blocks, and the block's input has that
    any other block           returns its tokens untouched

What a stage computes outside of its blocks (embeddings, the head) is small, and is thrown away on
all but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit_patch.planning.sequence_shares import SEQUENCE_DIM
from comfy_xdit_patch.wire.own_attribute import own_attribute
from comfy_xdit_patch.worker.ranks import collectives

DOUBLE = ("img", "txt")
"""First arguments of a double block's ``forward``, and what it returns."""
SINGLE = ("x",)


class Stage:
    """One rank's stage during one call."""

    def __init__(
        self,
        flux: Any,
        *,
        blocks: range,
        index: int,
        group: dist.ProcessGroup,
        lengths: Sequence[int],
    ) -> None:
        """Prepare.

        Args:
            blocks: numbers of this stage's blocks; double blocks are numbered first.
            index: this stage's place in ``group``, which has one rank of each stage.
            lengths: tokens of this rank's shard in every patch, in the order in which they come.
        """
        self._doubles, self._singles = list(flux.double_blocks), list(flux.single_blocks)
        self._range = blocks
        self._index = index
        self._group = group
        self._lengths = list(lengths)
        self._incoming: list[tuple[torch.Tensor, dist.Work]] = []
        self._sends: list[tuple[torch.Tensor, dist.Work]] = []
        self.block = -1
        """Number of the block that runs."""
        self.bytes_sent = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the stage's ``forward`` on every block while this lasts; then wait for all sends."""
        with ExitStack() as stack:
            for number, block in enumerate((*self._doubles, *self._singles)):
                names = DOUBLE if number < len(self._doubles) else SINGLE
                forward = self._forward(number, block.forward, names)
                stack.enter_context(own_attribute(block, "forward", forward))
            yield
        for _, work in self._sends:
            work.wait()
        self._sends.clear()

    def _forward(
        self, number: int, inner: Callable[..., Any], names: Sequence[str]
    ) -> Callable[..., Any]:
        is_first = number == self._range.start and self._index > 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens = [kwargs[name] if name in kwargs else args[i] for i, name in enumerate(names)]
            if number not in self._range:
                if number == self._range.stop:
                    self._send(tokens)
                return tuple(tokens) if len(tokens) > 1 else tokens[0]
            self.block = number
            if is_first:
                others = args[len(names) :]
                kwargs = {k: value for k, value in kwargs.items() if k not in names}
                return inner(*self._receive(tokens), *others, **kwargs)
            return inner(*args, **kwargs)

        return forward

    def _send(self, tokens: list[torch.Tensor]) -> None:
        # A tensor of its own: ComfyUI adds to what it goes on with in place.
        wire = torch.cat(tokens[::-1], SEQUENCE_DIM) if len(tokens) > 1 else tokens[0].clone()
        work = collectives.send_async(wire, to=self._index + 1, group=self._group)
        self._sends.append((wire, work))
        self.bytes_sent += wire.nbytes

    def _receive(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what stands in for these tokens, and let the next patch come meanwhile."""
        # A patch's transfer runs beside the patch before it, from the second patch on.
        while self._lengths and len(self._incoming) < 2:
            batch, _, features = tokens[0].shape
            wire = tokens[0].new_empty((batch, self._lengths.pop(0), features))
            work = collectives.receive_async(wire, source=self._index - 1, group=self._group)
            self._incoming.append((wire, work))
        wire, work = self._incoming.pop(0)
        work.wait()
        if len(tokens) == 1:
            return [wire]
        image, text = tokens
        sizes = [text.shape[SEQUENCE_DIM], image.shape[SEQUENCE_DIM]]
        return [part.contiguous() for part in reversed(torch.split(wire, sizes, SEQUENCE_DIM))]
