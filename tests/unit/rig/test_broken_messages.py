"""What breaks messages for the fuzz tests breaks them in every way that it names, and often."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from rig.broken_messages import CHANGES, HEADER, arriving, broken_body, broken_frame
from rig.sample_messages import MESSAGES

from comfy_xdit_patch.errors import ChannelClosedError, MessageError
from comfy_xdit_patch.wire.channel import MAX_MESSAGE_BYTES, frame_of
from comfy_xdit_patch.wire.messages.codec import decode, encode

SAMPLES = [json.loads(encode(message)) for message in MESSAGES]


def values_by_place(node, place=()):
    """Everything that is no container, and every empty one, by its keys from the outside."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = {}
    for key, value in items:
        is_inner = isinstance(value, (dict, list)) and value
        found |= values_by_place(value, (*place, key)) if is_inner else {(*place, key): value}
    return found


def has_fewer(before, after):
    old, new = values_by_place(before), values_by_place(after)
    return len(json.dumps(after)) < len(json.dumps(before)) and len(new) <= len(old)


def has_another_name(before, after):
    missing = before.keys() - after.keys()
    return len(missing) == 1 and before[missing.pop()] in after.values()


def has_one_more(before, after):
    return len(after) == len(before) + 1 and after.items() >= before.items()


def has_another_value(before, after):
    return before.keys() == after.keys() and before != after


def has_another_number(before, after):
    old, new = values_by_place(before), values_by_place(after)
    changed = [(old[place], new[place]) for place in old if old[place] != new.get(place)]
    return old.keys() == new.keys() and [type(a) in (int, float) for a, _ in changed] == [True]


def has_another_length(before, after):
    old, new = values_by_place(before), values_by_place(after)
    return before.keys() == after.keys() and len(old) != len(new)


def is_deep(before, after):
    return max(map(len, values_by_place(after))) >= 90


def is_of_another_type(before, after):
    return before | {"type": after["type"]} == after != before


WHAT_IT_DOES = {
    "drop": has_fewer,
    "rename": has_another_name,
    "add": has_one_more,
    "replace": has_another_value,
    "number": has_another_number,
    "repeat": has_another_length,
    "nest": is_deep,
    "retype": is_of_another_type,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_does_what_its_name_says(name):
    done = []
    for seed in range(10):
        for sample in SAMPLES:
            after = CHANGES[name](json.loads(json.dumps(sample)), random.Random(seed))
            done.append(isinstance(after, dict) and WHAT_IT_DOES[name](sample, after))
    assert sum(done) > 0.2 * len(done)


def kind_of(data):
    """How far a receiver comes with the bytes of a message."""
    try:
        body = json.loads(data)
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(body, dict):
        return "no object"
    if body.get("type") not in [sample["type"] for sample in SAMPLES]:
        return "of no type"
    try:
        return "a message as it was" if decode(data) in MESSAGES else "another message"
    except MessageError:
        return "fields that are not the type's"


def test_broken_bodies_are_broken_at_every_depth():
    kinds = Counter()
    for seed in range(2000):
        chance = random.Random(seed)
        kinds[kind_of(broken_body(chance.choice(MESSAGES), chance))] += 1
    few = {kind: kinds.pop(kind) for kind in ("not UTF-8", "not JSON", "no object")}
    assert min(few.values()) >= 20, few
    assert set(kinds) == {
        "of no type",
        "fields that are not the type's",
        "another message",
        "a message as it was",
    }
    assert min(kinds.values()) >= 100, kinds
    assert kinds["a message as it was"] < 200, "most of what is tried is broken"


def test_the_length_of_a_broken_frame_is_wrong_in_every_direction():
    found = Counter()
    for seed in range(1000):
        chance = random.Random(seed)
        frame = broken_frame(chance.choice(MESSAGES), chance)
        (length,) = HEADER.unpack_from(frame)
        rest = len(frame) - HEADER.size
        found["over the limit"] += length > MAX_MESSAGE_BYTES
        found["none"] += length == 0
        found["short"] += 0 < length < rest
        found["long"] += rest < length <= MAX_MESSAGE_BYTES
        found["right"] += length == rest
    assert min(found.values()) >= 10, found
    assert found["right"] > 700


def test_a_seed_names_one_message():
    first, second = (
        [broken_frame(MESSAGES[seed % len(MESSAGES)], random.Random(seed)) for seed in range(200)]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 190


def test_what_arrives_is_what_was_sent_up_to_the_first_error():
    whole = b"".join(map(frame_of, MESSAGES))
    *got, end = arriving(whole)
    assert got == MESSAGES
    assert isinstance(end, ChannelClosedError)
    *got, end = arriving(whole[:-1])
    assert got == MESSAGES[:-1]
    assert isinstance(end, ChannelClosedError)
    *got, end = arriving(frame_of(MESSAGES[0]) + HEADER.pack(2) + b"{}" + whole)
    assert got == MESSAGES[:1]
    assert isinstance(end, MessageError)
    assert isinstance(arriving(HEADER.pack(MAX_MESSAGE_BYTES + 1))[0], MessageError)
