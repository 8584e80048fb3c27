"""Machines by name, and what their links carry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comfy_xdit_patch.errors import PlanError, SettingsError
from comfy_xdit_patch.planning.cost.known_machines import (
    CARDS,
    MAX_GPUS,
    PCIE_BYTES_PER_S,
    machine_of,
)
from comfy_xdit_patch.planning.cost.machine import SOCKET_BYTES_PER_S, Machine, pcie_contention

PAIR = [(0, 1)]
FOUR = [(0, 1, 2, 3)]


def test_a_machine_is_made_of_cards_and_their_links():
    machine = machine_of("8xH100")
    assert [gpu.name for gpu in machine.gpus] == ["h100"] * 8
    assert {link.kind for row in machine.links for link in row} == {"nvlink"}


def test_cards_of_several_kinds_meet_on_what_both_have():
    machine = machine_of("1xh100+2xL40S+4090")
    assert [gpu.name for gpu in machine.gpus] == ["h100", "l40s", "l40s", "4090"]
    kinds = [[link.kind for link in row] for row in machine.links]
    assert kinds[0] == ["nvlink", "pcie", "pcie", "host"]
    assert kinds[1][2] == "pcie"
    assert kinds[2][3] == "host"
    # PCIe 5.0 of the H100 does not help: the L40S has 4.0.
    assert machine.links[0][1].ring_bytes_per_s == PCIE_BYTES_PER_S


def test_a_peer_to_peer_driver_is_a_link_by_name():
    plain, patched = machine_of("2x4090"), machine_of("2x4090", link="pcie")
    assert plain.links[0][1].kind == "host"
    assert patched.all_to_all_s(PAIR, 1e9) < plain.all_to_all_s(PAIR, 1e9)


@pytest.mark.parametrize(
    "gpus", ["", "8", "x4090", "0x4090", "4x4070", "4x 4090,", "-1xh100", "4x4090+", "999xh100"]
)
def test_what_is_no_machine_is_refused_with_the_cards(gpus):
    with pytest.raises(SettingsError, match=r"is not legal\. Legal: a count and a card") as caught:
        machine_of(gpus)
    assert all(name in str(caught.value) for name in CARDS)


@pytest.mark.parametrize(("gpus", "sockets"), [("4xl20", 5), ("4xl20", 0), ("9xl20+9xl20", 1)])
def test_numbers_that_no_machine_has_are_refused(gpus, sockets):
    with pytest.raises(SettingsError, match=rf"up to {MAX_GPUS} GPUs"):
        machine_of(gpus, num_sockets=sockets)


def test_nvlink_between_cards_without_it_is_refused():
    with pytest.raises(SettingsError, match=r"--link nvlink is not legal: 4090 has no NVLink"):
        machine_of("1xh100+1x4090", link="nvlink")


def test_links_must_match_the_gpus():
    machine = machine_of("2xl20")
    with pytest.raises(PlanError, match=r"A machine of 1 GPUs and links for 2x2"):
        Machine(gpus=machine.gpus[:1], links=machine.links)
    with pytest.raises(PlanError, match=r"A machine of 0 GPUs and links for none"):
        Machine(gpus=(), links=())


def test_sockets_share_the_gpus_in_their_order():
    assert [g.socket for g in machine_of("8x4090", num_sockets=2).gpus] == [0] * 4 + [1] * 4
    assert [g.socket for g in machine_of("5xl20", num_sockets=2).gpus] == [0, 0, 0, 1, 1]


def test_the_first_gpus_are_the_fastest_and_then_those_of_one_socket():
    mixed = machine_of("1x3090+2x4090")
    assert [gpu.name for gpu in mixed.first(2).gpus] == ["4090", "4090"]
    assert [gpu.name for gpu in mixed.first(3).gpus] == ["3090", "4090", "4090"]
    apart = machine_of("4xl20", num_sockets=2)
    turned = replace(apart, gpus=apart.gpus[::-1])
    assert [gpu.socket for gpu in turned.first(2).gpus] == [0, 0]
    assert [gpu.socket for gpu in turned.first(3).gpus] == [0, 0, 1]


def test_a_group_waits_for_its_slowest_link():
    machine = machine_of("2xh100+1xl40s")
    pair, all_three = [(0, 1)], [(0, 1, 2)]
    assert machine.latency_s(pair) < machine.latency_s(all_three)
    assert 5 * machine.ring_s(pair, 1e9) < machine.ring_s(all_three, 1e9)
    assert 5 * machine.all_to_all_s(pair, 1e9) < machine.all_to_all_s(all_three, 1e9)


def test_a_ring_uses_the_links_between_neighbours_only():
    machine = machine_of("4xl20")
    slow = replace(machine.links[0][2], ring_bytes_per_s=1e9, all_to_all_bytes_per_s=1e9)
    links = tuple(
        tuple(slow if (a - b) % 4 == 2 else machine.links[a][b] for b in range(4)) for a in range(4)
    )
    opposite = replace(machine, links=links)
    assert opposite.ring_s(FOUR, 1e9) == machine.ring_s(FOUR, 1e9)
    assert opposite.all_to_all_s(FOUR, 1e9) == pytest.approx(1 / 0.8)


def test_pcie_is_shared_and_nvlink_is_not():
    two, four, eight = (machine_of(f"{n}xl20") for n in (2, 4, 8))
    assert two.all_to_all_s(PAIR, 22e9) == pytest.approx(1)
    assert four.all_to_all_s(FOUR, 22e9) == pytest.approx(1 / 0.8)
    assert eight.all_to_all_s(FOUR, 22e9) == pytest.approx(1 / 0.55)
    assert pcie_contention(3) == pytest.approx(0.883, abs=1e-3)
    assert pcie_contention(12) == 0.55
    assert pcie_contention(1) == pcie_contention(2) == 1
    assert machine_of("8xh100").all_to_all_s(FOUR, 200e9) == pytest.approx(1)


def test_peer_to_peer_between_sockets_shares_one_way_through():
    machine = machine_of("4xl40s", num_sockets=2)
    # All-to-all of four: each sends 2 of its 3 parts to the other socket, 4 x 2/3, half each way.
    one_way = 4 * (2 / 3) / 2
    assert machine.all_to_all_s(FOUR, 6e9) == pytest.approx(6e9 * one_way / SOCKET_BYTES_PER_S)
    # A ring crosses twice, once each way.
    assert machine.ring_s(FOUR, 24e9) == pytest.approx(24e9 / SOCKET_BYTES_PER_S)
    assert machine.ring_s([(0, 1), (2, 3)], 22e9) == pytest.approx(1 / 0.8)
    # Two rings of pairs at once cross four times.
    assert machine.ring_s([(0, 2), (1, 3)], 24e9) == pytest.approx(2 * 24e9 / SOCKET_BYTES_PER_S)


@pytest.mark.parametrize(("gpus", "link"), [("4xh100", None), ("4xl40s", "host")])
def test_other_links_do_not_go_through_the_sockets_peer_to_peer(gpus, link):
    one, two = (machine_of(gpus, link=link, num_sockets=n) for n in (1, 2))
    assert one.all_to_all_s(FOUR, 1e9) == two.all_to_all_s(FOUR, 1e9)
