"""What lies between GPUs, read from what real machines say."""

from __future__ import annotations

import pytest
from rig import recorded_topologies as recorded

from comfy_xdit_patch.hardware.interconnect import (
    Place,
    interconnect_of,
    parse_gpus,
    parse_matrix,
    parse_numa_node,
    parse_pci_id,
)


def read(text, *, peers=None):
    """Put a recorded table into an ``Interconnect``; ``peers`` says it of all pairs."""
    matrix = parse_matrix(text)
    numbers = sorted({number for pair in matrix.words for number in pair} | set(matrix.numa_nodes))
    places = [Place(f"card {n}", f"GPU-{n}", None, matrix.numa_nodes.get(n)) for n in numbers]
    words = {(f"GPU-{a}", f"GPU-{b}"): word for (a, b), word in matrix.words.items()}
    known = {} if peers is None else dict.fromkeys(words, peers)
    return interconnect_of(places, words=words, peers=known)


def test_nvswitches_connect_every_gpu_with_every_other_across_sockets():
    found = read(recorded.H100_8)
    assert [place.numa_node for place in found.places] == [0] * 4 + [1] * 4
    pairs = [(a, b) for a in range(8) for b in range(8) if a != b]
    assert {found.path(a, b) for a, b in pairs} == {"18 NVLinks"}


@pytest.mark.parametrize("peers", [False, True, None])
def test_whether_there_is_peer_to_peer_is_told_beside_the_path(peers):
    found = read(recorded.RTX4090_8, peers=peers)
    assert len(found.places) == 8
    assert [place.numa_node for place in found.places] == [0] * 4 + [1] * 4
    assert {found.peers[0][b] for b in range(1, 8)} == {peers}


def test_sys_within_a_node_is_no_other_socket():
    found = read(recorded.RTX4090_8)
    assert found.path(0, 1) == "host bridges"
    assert found.path(0, 4) == "other socket"


def test_network_cards_are_passed_over_and_pairs_of_a_socket_are_told():
    found = read(recorded.L40S_4)
    assert [place.numa_node for place in found.places] == [0, 0, 1, 1]
    assert [[found.path(a, b) for b in range(4)] for a in range(2)] == [
        ["unknown", "host bridges", "other socket", "other socket"],
        ["host bridges", "unknown", "other socket", "other socket"],
    ]


def test_one_switch_is_told_from_several():
    found = read(recorded.SWITCHES_4, peers=True)
    assert (found.path(0, 1), found.path(2, 3)) == ("PCIe switches", "PCIe switch")
    assert found.path(1, 2) == "other socket"
    assert found.peers[0][1] is True


def test_geforce_cards_have_no_peer_to_peer():
    found = read(recorded.GEFORCE_2)
    assert (found.path(0, 1), found.places[1].numa_node) == ("host bridge", 0)
    peers = parse_matrix(recorded.GEFORCE_2_PEERS)
    assert peers.words == {(0, 1): "GNS", (1, 0): "GNS"}
    assert peers.numa_nodes == {}


def test_one_gpu_has_no_pairs_and_an_unknown_node():
    matrix = parse_matrix(recorded.TESLA_1)
    assert (matrix.words, matrix.numa_nodes) == ({}, {})


def test_an_old_table_has_links_and_no_nodes():
    matrix = parse_matrix(recorded.OLD_3)
    assert (matrix.words[0, 1], matrix.words[0, 2]) == ("PIX", "SYS")
    assert matrix.numa_nodes == {}


@pytest.mark.parametrize("name", recorded.TOPOLOGIES)
def test_an_underlined_header_reads_as_a_plain_one(name):
    text = recorded.TOPOLOGIES[name]
    head, rest = text.split("\n", 1)
    assert parse_matrix(f"\x1b[4m{head}\x1b[0m\n{rest}") == parse_matrix(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        "GPU0",
        "GPU0 GPU1 CPU Affinity NUMA Affinity\nGPU0",
        "\x00\xff\n" * 100,
        "GPU99999999999 X",
    ],
)
def test_what_is_no_table_says_nothing(text):
    matrix = parse_matrix(text)
    assert (matrix.words, matrix.numa_nodes) == ({}, {})


def test_a_table_cut_anywhere_never_says_more_than_the_whole():
    whole = parse_matrix(recorded.L40S_4)
    for length in range(0, len(recorded.L40S_4), 7):
        part = parse_matrix(recorded.L40S_4[:length])
        for pair, word in part.words.items():
            assert whole.words[pair].startswith(word)
        assert set(part.numa_nodes) <= set(whole.numa_nodes)


def test_gpus_are_listed_with_the_kernels_name_of_their_place():
    found = parse_gpus(recorded.listing(2))
    assert found == {
        0: (recorded.uuid_of(0), "0000:10:00.0"),
        1: (recorded.uuid_of(1), "0000:11:00.0"),
    }


@pytest.mark.parametrize(
    "text", ["", "No devices were found", "0, GPU-1", "x, GPU-1, 0:0", "0, 1, 2", "0,GPU-1,1,2"]
)
def test_what_is_no_list_of_gpus_lists_none(text):
    assert parse_gpus(text) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("00000000:C1:00.0", "0000:c1:00.0"),
        ("00010000:01:00.0\n", "10000:01:00.0"),
        ("0000:0a:00", "0000:0a:00.0"),
        ("[N/A]", None),
        ("../../etc", None),
    ],
)
def test_a_pci_id_is_the_kernels(text, expected):
    assert parse_pci_id(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("1\n", 1), ("-1\n", None), ("", None)])
def test_a_numa_node_of_minus_one_is_unknown(text, expected):
    assert parse_numa_node(text) == expected


def test_cpu_ranks_have_no_place():
    found = interconnect_of([Place("cpu", None)] * 2, words={}, peers={})
    assert (found.path(0, 1), found.peers[0][1]) == ("unknown", None)
