"""Random graphs: the same seed draws the same graph, and everything is drawn now and then."""

from __future__ import annotations

import pytest
from rig.random_graphs import LATENT_HINTS, PICTURE_HINTS, draw

MANY = [draw(seed) for seed in range(200)]
PARTS = [
    "LoRA",
    "cfg",
    "ScaleROPE",
    "ModelSamplingFlux",
    "FluxDisableGuidance",
    "batch of 3",
    "noise mask",
    "DifferentialDiffusion",
    "inpaint",
    "second prompt (area)",
    "second prompt (mask bounds)",
    "Redux attn_bias",
    "references",
    "second sampler",
    "second sampler, larger",
    *(name.removesuffix(".safetensors") for name in (*LATENT_HINTS, *PICTURE_HINTS)),
]


def test_the_same_seed_draws_the_same_graph():
    assert draw(17) == draw(17)
    assert draw(17).graph != draw(18).graph


@pytest.mark.parametrize("part", PARTS)
def test_two_hundred_graphs_hold_everything(part):
    assert any(part in text for drawn in MANY for text in drawn.parts)


def test_every_link_leads_to_a_node():
    for drawn in MANY:
        for node in drawn.graph.values():
            links = [value for value in node["inputs"].values() if isinstance(value, list)]
            assert all(link[0] in drawn.graph for link in links), str(drawn)
