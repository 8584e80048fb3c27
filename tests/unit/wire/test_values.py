"""Plain values cross as what they were; nothing else crosses."""

from __future__ import annotations

import enum
import json
import sys
import types
from typing import NamedTuple

import pytest
import torch

from comfy_xdit_patch.wire.values import (
    UncarriedValueError,
    decode_class,
    decode_value,
    encode_class,
    encode_value,
)


class Kind(enum.IntEnum):
    Q4_K = 12


class Point(NamedTuple):
    x: int


class Outer:
    class Inner:
        """A class inside of a class, as operations classes have."""


VALUES = [
    *(None, True, 7, -0.5, "text", float("inf")),
    torch.float8_e4m3fn,
    torch.Size([3, 4]),
    Kind.Q4_K,
    Outer.Inner,
    (1, [2, (3,)], {4}),
    {"a": (1, 2), 5: None, "dtype": torch.bfloat16},
    {"$tuple": [1], "b": {"$list": {}}},
    {},
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_value_arrives_as_it_was(value):
    arrived = decode_value(json.loads(json.dumps(encode_value(value))))
    assert arrived == value
    assert type(arrived) is type(value)


@pytest.mark.parametrize(
    "value", [object(), lambda: None, torch.ones(1), b"bytes", [object()], Point(1)]
)
def test_anything_else_is_refused(value):
    with pytest.raises(UncarriedValueError):
        encode_value(value)


def test_a_caller_has_words_for_kinds_of_its_own_and_hears_where_they_are():
    seen = []

    def place(path, value):
        seen.append(path)
        return {"$complex": encode_value((value.real, value.imag))}

    value = {"a": [1, (2j, {"b": 3j})], "c": 4}
    tree = json.loads(json.dumps(encode_value(value, place, "value")))
    assert tree["c"] == 4, "what JSON has words for is itself"
    assert seen == ["value.a.1.0", "value.a.1.1.b"]
    kinds = {"$complex": lambda inner: complex(*decode_value(inner))}
    assert decode_value(tree, kinds) == value


def test_a_class_that_has_no_importable_name_is_refused():
    def make():
        class Hidden:
            pass

        return Hidden

    with pytest.raises(UncarriedValueError, match="Hidden"):
        encode_class(make())


def test_a_node_packs_class_is_imported_without_running_the_pack(tmp_path, monkeypatch):
    # ComfyUI names a pack's package after its directory.
    directory = tmp_path / "custom_nodes" / "some-pack"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("raise RuntimeError('would register nodes')\n")
    (directory / "names.py").write_text("NAME = 'here'\n")
    (directory / "ops.py").write_text(
        "from .names import NAME\nclass Ops:\n    class Linear:\n        name = NAME\n"
    )
    package = str(directory)
    file = str(directory / "ops.py")
    tree = [[f"{package}.ops", file, [[package, [str(directory)]]]], "Ops.Linear"]
    try:
        assert decode_class(tree).name == "here"
        assert isinstance(sys.modules[package], types.ModuleType)
        assert encode_class(decode_class(tree)) == tree
    finally:
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
