"""The system is asked, and whatever it does not answer is unknown."""

from __future__ import annotations

import time

import pytest
from rig import recorded_topologies as recorded

from comfy_xdit_patch.hardware import survey as asking
from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.hardware.survey import survey

DEVICES = [Device(f"card {i}", recorded.uuid_of(i), 24 << 30) for i in (3, 0)]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """``nvidia_smi(script)``: the only program on PATH, a shell script of that text."""

    def make(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return make


@pytest.fixture
def machine(nvidia_smi, tmp_path, monkeypatch):
    """Four L40S on two sockets, of which the kernel says that card 0 is at node 5."""
    (tmp_path / "listing").write_text(recorded.listing(4))
    (tmp_path / "matrix").write_text(recorded.L40S_4)
    (tmp_path / "peers").write_text(recorded.L40S_4.replace("SYS ", "CNS ").replace("NODE", "OK"))
    nvidia_smi(
        f'case "$2" in -m) f=matrix;; -p2p) f=peers;; *) f=listing;; esac\n'
        f'while IFS= read -r line; do echo "$line"; done < {tmp_path}/$f'
    )
    sysfs = tmp_path / "sys"
    (sysfs / "0000:10:00.0").mkdir(parents=True)
    (sysfs / "0000:10:00.0" / "numa_node").write_text("5\n")
    monkeypatch.setattr(asking, "PCI_DEVICES", sysfs)


def test_places_are_in_rank_order_whatever_nvidia_smi_numbers(machine):
    found = survey(DEVICES)
    assert [place.pci_id for place in found.places] == ["0000:13:00.0", "0000:10:00.0"]
    assert [place.numa_node for place in found.places] == [1, 5], "the kernel before nvidia-smi"
    assert (found.path(0, 1), found.peers[0][1]) == ("other socket", False)
    assert found.unknown == ()


def test_peers_come_from_nvidia_smi_where_torch_sees_no_gpu(machine):
    near = [Device("a", recorded.uuid_of(0)), Device("b", recorded.uuid_of(1))]
    assert survey(near).peers[0][1] is True


def test_a_gpu_that_nobody_knows_is_unknown(machine):
    found = survey([DEVICES[0], Device("mig", "MIG-1234")])
    assert found.places[1].pci_id is None
    assert (found.path(0, 1), found.peers[0][1]) == ("unknown", None)


def test_without_nvidia_smi_everything_is_unknown_and_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = survey(DEVICES)
    assert found.path(0, 1) == "unknown"
    assert found.peers[0][1] is None
    assert len(found.unknown) == 3
    assert all("not installed" in text for text in found.unknown)


@pytest.mark.parametrize("script", ["exit 9", "echo nonsense; exit 1", "kill -9 $$"])
def test_an_nvidia_smi_that_fails_is_unknown(nvidia_smi, script):
    nvidia_smi(script)
    found = survey(DEVICES)
    assert found.path(0, 1) == "unknown"
    assert all("it ended with exit code" in text for text in found.unknown)


def test_an_nvidia_smi_that_is_no_program_is_unknown(nvidia_smi, tmp_path):
    nvidia_smi("")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF")
    assert len(survey(DEVICES).unknown) == 3


def test_an_nvidia_smi_that_hangs_is_given_up_once_for_all_questions(nvidia_smi, monkeypatch):
    monkeypatch.setattr(asking, "ASK_S", 0.3)
    nvidia_smi("exec /bin/sleep 60")
    start = time.monotonic()
    found = survey(DEVICES)
    assert time.monotonic() - start < 3
    assert all("no answer within 0.3 s" in text for text in found.unknown)


def test_an_interrupt_ends_the_wait(nvidia_smi):
    nvidia_smi("exec /bin/sleep 60")

    def interrupt():
        raise InterruptedError

    start = time.monotonic()
    with pytest.raises(InterruptedError):
        survey(DEVICES, poll=interrupt)
    assert time.monotonic() - start < 2


def test_cpu_ranks_ask_nobody(nvidia_smi):
    nvidia_smi("exit 9")
    found = survey([Device("cpu")] * 2)
    assert (len(found.places), found.unknown) == (2, ())
