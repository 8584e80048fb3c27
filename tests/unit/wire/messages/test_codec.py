"""Every message survives the wire; nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
from hypothesis import given
from rig.broken_messages import tried, values_of

from comfy_xdit_patch.errors import MessageError
from comfy_xdit_patch.wire.messages.codec import Message, decode, encode
from comfy_xdit_patch.wire.messages.requests import Load, ModelSource, Residence

SOURCE = ModelSource("load_diffusion_model", "/models/fl\u00fcx \udcff.safetensors", {}, "2049:131")
LOAD = Load(1, 2, SOURCE, None, {"patches": {}}, "cd" * 32, Residence(grid=(1, 2)), None, True)


@pytest.mark.parametrize("cls", get_args(Message), ids=lambda cls: cls.__name__)
def test_a_message_of_any_type_is_one_readable_line_and_arrives_as_it_was_sent(cls):
    @tried(25)
    @given(message=values_of(cls))
    def try_one(message):
        data = encode(message)
        assert data.isascii()
        assert b"\n" not in data
        assert json.loads(data)["type"] == cls.__name__
        assert repr(decode(data)) == repr(message)  # There may be NaN in it.
        for field in dataclasses.fields(message):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(message, field.name, None)

    try_one()


def with_residence(**changes):
    """A ``Load`` whose residence has other fields."""
    body = json.loads(encode(LOAD))
    return json.dumps(body | {"residence": body["residence"] | changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff\xfe garbage",
        b"null",
        b"[]",
        b'"Stop"',
        b"{}",
        b'{"type":"Stop"',
        b'{"type":"Reboot"}',
        b'{"type":["Stop"]}',
        b'{"type":"Stop","why":"x"}',
        b'{"type":"Map","slot":1}',
        b'{"type":"Load","request":1,"model":2,"source":{"loader":"x"}}',
        b'{"type":"Load","request":1,"model":2,"source":7}',
        with_residence(mode="tensor=2"),
        with_residence(mode=["full"]),
        with_residence(tensor_degree="2"),
        with_residence(grid=[1, "2"]),
        with_residence(grid=7),
        with_residence(stage=1),
        b'{"type":"Unload","request":"1"}',
        b'{"type":"Unload","request":true}',
        b'{"type":"Unload","request":1.0}',
        b'{"type":"Unload","request":9223372036854775808}',
        b'{"type":"Unload","request":null}',
        b'{"type":"Drop","models":[1,"2"]}',
        b'{"type":"Drop","models":{"1":2}}',
        b'{"type":"Loading","request":1,"done":NaN}',
        b'{"type":"Loading","request":1,"done":1e999}',
        b'{"type":"Declined","request":1,"reason":["x"]}',
        b'{"type":"SlotRef","slot":1,"version":1,"dtype":"float32","shape":[1]}',
        b"[" * 100_000,
        b"9" * 5000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_anything_else_is_an_error_that_shows_its_beginning(data):
    with pytest.raises(MessageError, match=r"^Not a message of comfy-xdit-patch: ") as caught:
        decode(data)
    assert repr(data[:80]) in str(caught.value)


def test_an_error_about_a_large_message_is_short():
    names = ",".join(f'"field{n}":0' for n in range(100_000))
    with pytest.raises(MessageError) as caught:
        decode(f'{{"type":"Stop",{names}}}'.encode())
    assert len(str(caught.value)) < 1000


def test_a_cut_message_is_an_error_at_every_length():
    data = encode(LOAD)
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:length])
