"""Where a replacement was written."""

from __future__ import annotations

import functools
import types

import wrapt

from comfy_xdit_patch.blame import origin

HERE = __name__


def another(*_):
    pass


def of_pack(name: str):
    """A function as the code of a node pack makes it."""
    names: dict = {"__name__": f"/ComfyUI/custom_nodes/{name}.nodes"}
    exec("def f(*_): pass", names)
    return names["f"]


def test_an_origin_is_where_it_was_written():
    def inner():
        pass

    assert origin(inner) == f"{HERE}.test_an_origin_is_where_it_was_written.inner"
    for made in (functools.partial(another, 1), staticmethod(another), property(another)):
        assert origin(made) == f"{HERE}.another"
    assert origin(types.MethodType(another, object())) == f"{HERE}.another"
    assert origin(types.MethodType(functools.partial(another), 1)) == f"{HERE}.another"
    cls = type("Embedder", (), {"__module__": "/somewhere/custom_nodes/pack.nodes"})
    assert origin(cls) == origin(cls()) == "pack.nodes.Embedder"


def test_who_wraps_is_meant_and_not_what_is_wrapped():
    assert origin(wrapt.FunctionWrapper(len, another)) == f"{HERE}.another"
    assert origin(functools.wraps(len)(of_pack("sage"))) == "sage.nodes.f"
    assert origin(functools.wraps(of_pack("sage"))(another)) == f"{HERE}.another"


def test_a_value_has_a_kind():
    assert origin(1) == "another int"
    assert origin({}) == "another dict"
    assert origin(None) == "nothing"
    assert origin(len) == "len"
