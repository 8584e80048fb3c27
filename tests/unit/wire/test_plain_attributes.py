"""What of a model's attributes is compared."""

from __future__ import annotations

import types

import torch

from comfy_xdit_patch.wire.plain_attributes import changed, plain_attributes


class Positions(torch.nn.Module):
    def __init__(self, theta: float = 10000):
        super().__init__()
        self.theta, self.axes = theta, [16, 56, 56]
        self.weight_function = []
        self.comfy_cast_weights = True
        self.table = {}


class Model(torch.nn.Module):
    def __init__(self, **parameters):
        super().__init__()
        self.params = types.SimpleNamespace(depth=19, default_ref_method="offset", **parameters)
        self.double_blocks = torch.nn.ModuleList([torch.nn.LayerNorm(4), torch.nn.Linear(4, 8)])
        self.pe_embedder = Positions()


def test_numbers_texts_and_lists_of_modules_count_and_bookkeeping_does_not():
    found = plain_attributes(Model())
    assert found["pe_embedder"] == {"theta": "[10000]", "axes": "[16, 56, 56]"}
    assert found["double_blocks.0"]["eps"] == "[1e-05]"
    assert found["double_blocks.1"] == {"in_features": "[4]", "out_features": "[8]"}
    assert found[""] == {"params.depth": "[19]"}


def test_what_differs_is_named():
    model = Model(ref_index_scale=1.0)
    built = plain_attributes(model)
    assert list(changed(built, plain_attributes(model))) == []
    model.pe_embedder.theta = 5000
    model.double_blocks[0].eps = 0.1
    model.params.ref_index_scale = 2.0
    model.params.default_ref_method = "index"  # an argument of the call
    model.pe_embedder.train()
    assert list(changed(built, plain_attributes(model))) == [
        ("", "params.ref_index_scale"),
        ("double_blocks.0", "eps"),
        ("pe_embedder", "theta"),
    ]


def test_a_compiled_module_has_those_of_the_one_that_it_was_made_from():
    model = Model()
    built = plain_attributes(model)
    model.double_blocks[0] = torch.compile(model.double_blocks[0])
    assert plain_attributes(model) == built
