"""What a stream keeps: filled in one order, refreshed patch by patch in another."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.errors import WorkerError
from comfy_xdit_patch.planning.sequence_shares import weighted_shares
from comfy_xdit_patch.worker.pipefusion.kept_keys import KeptKeys, StreamKeys


def shares(num_patches=2):
    return weighted_shares(
        num_text_tokens=4,
        num_image_tokens=8,
        num_heads=2,
        weights=(1,) * num_patches,
        ring_degree=num_patches,
    )


def tokens(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


def test_keys_of_an_exact_call_are_put_in_order_and_a_patch_changes_its_own():
    kept = KeptKeys(shares())
    kept.fill(3, tokens(0, 1, 2, 3), tokens(10, 11, 12, 13), torch.tensor([0, 2, 1, 3]))
    k, v = kept.refresh(3, tokens(7, 8), tokens(17, 18), 2)
    assert k.flatten().tolist() == [0, 2, 7, 8]
    assert v.flatten().tolist() == [10, 12, 17, 18]
    k, _ = kept.refresh(3, tokens(5, 6), tokens(15, 16), 0)
    assert k.flatten().tolist() == [5, 6, 7, 8], "fresh ones stay"


def test_what_is_kept_is_no_view_of_what_was_given():
    kept = KeptKeys(shares())
    given = tokens(1, 2, 3, 4)
    kept.fill(0, given, given, torch.arange(4))
    given.zero_()
    assert kept.refresh(0, tokens(9), tokens(9), 3)[0].flatten().tolist() == [1, 2, 3, 9]


def test_a_stream_goes_on_only_as_it_was_begun():
    streams = StreamKeys()
    begun = streams.begin(1, shares())
    assert streams.get(1, shares()) is begun
    with pytest.raises(WorkerError, match="Stream 1"):
        streams.get(1, shares(num_patches=3))
    with pytest.raises(WorkerError, match="Stream 2"):
        streams.get(2, shares())
    assert streams.begin(1, shares()) is not begun


def test_streams_are_forgotten_by_number_or_all():
    streams = StreamKeys()
    for stream in (1, 2, 3):
        streams.begin(stream, shares())
    streams.forget([1, 9])
    with pytest.raises(WorkerError):
        streams.get(1, shares())
    streams.get(2, shares())
    streams.forget()
    with pytest.raises(WorkerError):
        streams.get(2, shares())
