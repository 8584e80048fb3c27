"""Whose a replacement is."""

from __future__ import annotations

import functools
import sys
import types

import wrapt

from comfy_xdit_patch.blame import whose


def of_pack(name: str):
    """A function as the code of a node pack makes it."""
    names: dict = {"__name__": f"/ComfyUI/custom_nodes/{name}"}
    exec(compile("def f(*_): pass", f"/ComfyUI/custom_nodes/{name}/nodes.py", "exec"), names)
    return names["f"]


def test_a_node_pack_is_known_by_its_folder() -> None:
    assert whose(of_pack("sage")) == "the node pack sage"
    assert whose(functools.partial(of_pack("sage"), 1)) == "the node pack sage"
    assert whose(staticmethod(of_pack("sage"))) == "the node pack sage"


def test_who_wraps_is_meant_and_not_what_is_wrapped() -> None:
    wrapper = wrapt.FunctionWrapper(len, lambda *_: None)
    assert whose(wrapper) == "tests"
    assert whose(functools.wraps(len)(of_pack("sage"))) == "the node pack sage"


def test_others_are_known_by_their_package() -> None:
    module = types.ModuleType("kernels.attention")
    sys.modules[module.__name__] = module
    exec("class Attention: pass", vars(module))
    assert whose(module.Attention()) == "kernels"
    assert whose(None) == whose(2) == "another extension"
