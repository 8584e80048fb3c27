"""Tokens on the ranks as tensors here: what is only written down, and what aliases what."""

from __future__ import annotations

import pytest
import torch

from comfy_xdit_patch.host.step.tokens_there import Kept, RemoteTokens, encode

COUNTS = (3, 5, 0)
LIKE = torch.empty(0)


class Ranks:
    """What the ranks keep, and how often somebody looked."""

    def __init__(self):
        self.whole = torch.rand(1, 8, 2)
        self.parts = {1: self.whole[:, :3], 2: self.whole[:, 3:], 3: self.whole}
        self.fetched, self.forgotten = [], []

    def fetch(self, tokens):
        self.fetched.append(encode(tokens.recipe))
        kind, number = self.fetched[-1][:2]
        return (self.parts[number] if kind == "kept" else self.whole).clone()

    def tokens(self, number, stream, weights=()):
        return RemoteTokens.make(
            stream,
            shape=self.parts[number].shape,
            like=LIKE,
            recipe=("kept", Kept(number, self.forgotten.append)),
            counts=COUNTS,
            fetch=self.fetch,
            weights=weights,
        )


@pytest.fixture
def ranks():
    return Ranks()


@torch.inference_mode()
def test_what_stock_does_between_blocks_is_only_written_down(ranks):
    text, image = ranks.tokens(1, "text"), ranks.tokens(2, "image")
    joint = torch.cat((text, image), 1)
    again = joint[:, text.shape[1] :, ...]
    assert encode(joint.recipe) == ["join", ["kept", 1], ["kept", 2]]
    assert encode(again.recipe) == ["image", ["join", ["kept", 1], ["kept", 2]]]
    assert (joint.shape, again.shape) == ((1, 8, 2), (1, 5, 2))
    assert ranks.fetched == []


@torch.inference_mode()
def test_writing_to_the_images_part_of_all_tokens_writes_to_them(ranks):
    joint = ranks.tokens(3, "joint")
    expected = ranks.whole.clone()
    expected[:, 3:] += 1
    joint[:, 3:] += 1
    assert torch.equal(joint.numbers(), expected)
    assert joint.recipe is None, "they are here now, and have to be sent"
    assert ranks.fetched == [["kept", 3]]


@torch.inference_mode()
def test_a_part_taken_before_a_block_sees_what_the_block_did(ranks):
    joint = ranks.tokens(1, "joint")
    part = joint[:, 3:]
    joint.move(("kept", Kept(3, ranks.forgotten.append)), COUNTS, ranks.fetch)
    assert torch.equal(part.numbers(), ranks.whole[:, 3:])


@torch.inference_mode()
def test_tokens_that_the_ranks_share_otherwise_are_not_joined_there(ranks):
    text, image = ranks.tokens(1, "text", (2, 1)), ranks.tokens(2, "image", (3, 1))
    assert torch.equal(torch.cat((text, image), 1), ranks.whole)
    assert ranks.fetched == [["kept", 1], ["kept", 2]]
    same = torch.cat((ranks.tokens(1, "text", (3, 1)), ranks.tokens(2, "image", (3, 1))), 1)
    assert same.weights == (3, 1)
    assert len(ranks.fetched) == 2


@torch.inference_mode()
def test_a_part_is_shared_as_the_whole_is_now(ranks):
    joint = ranks.tokens(1, "joint", (2, 1))
    part = joint[:, 3:]
    assert part.weights == (2, 1)
    joint.move(("kept", Kept(3, ranks.forgotten.append)), COUNTS, ranks.fetch, (3, 1))
    assert part.weights == (3, 1)


@torch.inference_mode()
def test_any_other_arithmetic_gets_the_numbers(ranks):
    image = ranks.tokens(2, "image")
    assert torch.equal(image * 2 + 1, ranks.parts[2] * 2 + 1)
    assert len(ranks.fetched) == 1


@torch.inference_mode()
def test_what_is_here_is_changed_in_place_by_a_block(ranks):
    here = torch.rand(1, 5, 2)
    image = RemoteTokens.make("image", shape=here.shape, like=here, here=here)
    kept = image
    assert torch.equal(image.clone(), here)
    image.move(("kept", Kept(2, ranks.forgotten.append)), COUNTS, ranks.fetch)
    assert torch.equal(kept.numbers(), ranks.parts[2])


def test_the_ranks_hear_what_nothing_refers_to_any_more(ranks):
    tokens = ranks.tokens(2, "image")
    assert ranks.forgotten == []
    del tokens
    assert ranks.forgotten == [2]
