"""Every feature of a block's linears belongs to one rank, and to the same rank all through it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from comfy_xdit_patch.planning.tensor_cuts import LARGEST_UNIT, cuts_of, modulation_cuts

WIDTH, HEADS = 384, 3


def linear(num_outputs, num_inputs):
    return SimpleNamespace(weight=SimpleNamespace(shape=(num_outputs, num_inputs)))


class Mlp(SimpleNamespace):
    """A ``Sequential``: its layers are attributes with numbers for names."""


def plain_mlp(columns, num_pieces):
    return Mlp(**{"0": linear(columns * num_pieces, WIDTH), "2": linear(WIDTH, columns)})


def gated_mlp(columns):
    return Mlp(
        gate_proj=linear(columns, WIDTH),
        up_proj=linear(columns, WIDTH),
        down_proj=linear(WIDTH, columns),
    )


def flux(*, columns=1536, num_pieces=1, is_gated=False, has_modulation=True):
    def modulation(sets):
        return SimpleNamespace(lin=linear(3 * sets * WIDTH, WIDTH))

    mlp = gated_mlp(columns) if is_gated else plain_mlp(columns, num_pieces)
    double = SimpleNamespace(
        num_heads=HEADS, hidden_size=WIDTH, modulation=has_modulation, img_mlp=mlp, txt_mlp=mlp
    )
    if has_modulation:
        double.img_mod = double.txt_mod = modulation(2)
    single = SimpleNamespace(
        num_heads=HEADS,
        hidden_size=WIDTH,
        mlp_hidden_dim=columns,
        mlp_hidden_dim_first=columns * (2 if is_gated else num_pieces),
        modulation=modulation(1) if has_modulation else None,
    )
    return SimpleNamespace(double_blocks=[double], single_blocks=[single, single])


KINDS = {
    "FLUX.1": {},
    "FLUX.2": {"num_pieces": 2, "has_modulation": False, "columns": 1152},
    "Ovis-Image": {"is_gated": True},
    "Chroma": {"has_modulation": False},
    "odd columns": {"columns": 1001, "num_pieces": 2},
}


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_every_feature_once(kind, degree):
    blocks = list(cuts_of(flux(**KINDS[kind]), degree))
    assert [block.name for block in blocks] == [
        "double_blocks.0",
        "single_blocks.0",
        "single_blocks.1",
    ]
    for block in blocks:
        for cut in block.cuts:
            covered = [
                feature
                for rank in range(degree)
                for first, end in cut.ranges(rank, degree)
                for feature in range(first, end)
            ]
            total = sum(part.num_units * part.width for part in cut.parts)
            assert sorted(covered) == list(range(total))
            assert sum(cut.sizes(degree)) == total
            assert (cut.result == "summed") == (cut.dim == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rank_makes_is_what_it_sums_over(kind):
    for index in range(2):
        for block in cuts_of(flux(**KINDS[kind]), 2):
            sizes = block.sizes(index, 2)
            made = {"heads": 0, "columns": 0}
            for cut in block.cuts:
                if cut.result != "gathered" and cut.dim == 0:
                    made["heads"] += sum(part is block.heads for part in cut.parts)
                    made["columns"] += sum(part == block.columns for part in cut.parts)
            num_streams = 2 if block.name.startswith("double") else 1
            assert made["heads"] == 3 * num_streams
            assert made["columns"] == block.num_pieces * num_streams
            assert sizes["num_heads"] * WIDTH // HEADS == sizes["hidden_size"]
            assert sizes["mlp_hidden_dim_first"] == sizes["mlp_hidden_dim"] * block.num_pieces
            for cut in block.cuts:
                if cut.dim == 1 and len(cut.parts) == 2:
                    assert cut.sizes(2)[index] == sizes["hidden_size"] + sizes["mlp_hidden_dim"]


def test_fused_parts_are_cut_one_by_one():
    single = list(cuts_of(flux(num_pieces=2, columns=1152, has_modulation=False), 2))[1]
    (linear1, linear2) = single.cuts
    # q, k, v of heads 2 and 1 of 3, then gate and up.
    assert linear1.ranges(0, 2) == ((0, 256), (384, 640), (768, 1024), (1152, 1728), (2304, 2880))
    assert linear2.ranges(1, 2) == ((256, 384), (384 + 576, 384 + 1152))


def test_columns_are_cut_in_multiples_that_kernels_want_where_they_can():
    block = next(cuts_of(flux(columns=1536), 5))
    assert block.columns.width == LARGEST_UNIT
    assert {size % LARGEST_UNIT for size in block.cuts[3].sizes(5)} == {0}
    assert next(cuts_of(flux(columns=1001), 2)).columns.width == 1


@pytest.mark.parametrize("degree", [2, 3, 4, 7, 8])
def test_modulation_alone_is_cut_in_the_order_of_the_blocks(degree):
    cuts = modulation_cuts(flux(), degree)
    singles = [f"single_blocks.{number}.modulation.lin" for number in range(2)]
    assert [*cuts] == ["double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin", *singles]
    for name, cut in cuts.items():
        sizes = cut.sizes(degree)
        assert sum(sizes) == (6 if name.startswith("double") else 3) * WIDTH
        assert max(sizes) - min(sizes) <= LARGEST_UNIT
    assert modulation_cuts(flux(has_modulation=False), degree) == {}
