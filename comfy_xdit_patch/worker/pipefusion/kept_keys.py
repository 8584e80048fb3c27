"""Keys and values that PipeFusion keeps from one call to the next.

Runs in: worker process.

Dimension letters in this file
    B  batch
    G  heads of this rank
    S  sequence: all tokens, pipeline patch after pipeline patch, in each rank after rank
    P  tokens of one pipeline patch
    K  head width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.planning.sequence_shares import SequenceShares

KeyValue = tuple[torch.Tensor, torch.Tensor]


class KeptKeys:
    """Keys and values of one stream, for the blocks of this rank's stage."""

    def __init__(self, shares: SequenceShares) -> None:
        """Begin without keys.

        Args:
            shares: of all pipeline patches; they say what lies where.
        """
        self.shares = shares
        self._kept: dict[int, KeyValue] = {}

    def fill(
        self, block: int, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, order: torch.Tensor
    ) -> None:
        """Keep a block's keys and values of an exact call.

        Args:
            order: where each token of ours stands among those given.
        """
        self._kept[block] = k_BGSK.index_select(2, order), v_BGSK.index_select(2, order)

    def refresh(
        self, block: int, k_BGPK: torch.Tensor, v_BGPK: torch.Tensor, first: int
    ) -> KeyValue:
        """Put those of one patch in place, and return all: older ones of the patches to come."""
        kept = self._kept[block]
        for all_tokens, fresh in zip(kept, (k_BGPK, v_BGPK), strict=True):
            all_tokens.narrow(2, first, fresh.shape[2]).copy_(fresh)
        return kept


class StreamKeys:
    """Keys and values of all streams, by the host's numbers."""

    def __init__(self) -> None:
        self._streams: dict[int, KeptKeys] = {}

    def begin(self, stream: int, shares: SequenceShares) -> KeptKeys:
        """Return an empty place for a stream; what it had is dropped first."""
        self._streams.pop(stream, None)
        kept = self._streams[stream] = KeptKeys(shares)
        return kept

    def get(self, stream: int, shares: SequenceShares) -> KeptKeys:
        """Return what the call before left.

        Raises:
            WorkerError: nothing was kept, or it belongs to other tokens.
        """
        kept = self._streams.get(stream)
        if kept is None or kept.shares != shares:
            raise WorkerError(f"Stream {stream} is to go on and was not begun like this.")
        return kept

    def forget(self, streams: Sequence[int] | None = None) -> None:
        """Free what some streams keep; all streams by default."""
        for stream in list(self._streams) if streams is None else streams:
            self._streams.pop(stream, None)
