"""Which devices XDIT_GPUS means, on machines that torch pretends to be on."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.hardware.devices import (
    Device,
    choose_devices,
    pci_ids,
    peer_access,
    visible_gpus,
)
from comfy_xdit_patch.settings import parse_gpus


@pytest.fixture
def machine(monkeypatch):
    """``machine(3)``: three GPUs are visible to this process."""

    def pretend(num_gpus, *, cuda="13.0"):
        def properties(index):
            return types.SimpleNamespace(
                name=f"Card {index}", uuid=f"0000-{index}", total_memory=24 << 30
            )

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    return pretend


def gpu(index):
    return Device(name=f"Card {index}", uuid=f"GPU-0000-{index}", memory_bytes=24 << 30)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", (0, 1, 2, 3)),
        ("2", (0, 1)),
        ("1", (0,)),
        ("3,1", (3, 1)),
    ],
)
def test_gpus_are_taken_in_the_order_asked_for(machine, value, expected):
    machine(4)
    assert choose_devices(parse_gpus(value)) == tuple(gpu(index) for index in expected)


def test_uuids_are_taken_as_they_are(machine):
    machine(4)
    devices = choose_devices(parse_gpus("GPU-1a2b,GPU-3c4d"))
    assert [device.uuid for device in devices] == ["GPU-1a2b", "GPU-3c4d"]


@pytest.mark.parametrize(
    ("name", "uuid"), [("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "1a2b"), ("Card", "MIG-1a2b")]
)
@pytest.mark.parametrize("value", ["all", "2", "1"])
def test_slices_of_a_gpu_are_refused_for_nccl_connects_whole_ones(
    machine, monkeypatch, value, name, uuid
):
    machine(2)
    properties = types.SimpleNamespace(name=name, uuid=uuid, total_memory=10 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    refusal = choose_devices(parse_gpus(value))
    assert refusal == Refusal("a visible GPU is a MIG slice, and NCCL connects whole GPUs only")


@pytest.mark.parametrize("uuid", ["GPU-1a2b", "MIG-1a2b"])
def test_a_uuid_that_names_its_kind_is_not_prefixed_again(machine, monkeypatch, uuid):
    machine(1)
    properties = types.SimpleNamespace(name="Card", uuid=uuid, total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert visible_gpus() == (Device(name="Card", uuid=uuid, memory_bytes=1 << 30),)


@pytest.mark.parametrize("num_gpus", [0, 1, 4])
def test_cpu_ranks_need_no_gpu(machine, num_gpus):
    machine(num_gpus)
    devices = choose_devices(parse_gpus("cpu:3"))
    assert [device.is_cpu for device in devices] == [True] * 3


@pytest.mark.parametrize(
    ("num_gpus", "reason"),
    [(0, "no usable GPU is visible"), (1, "one GPU is visible, nothing to share")],
)
def test_a_machine_with_nothing_to_share_is_a_refusal_and_no_error(machine, num_gpus, reason):
    machine(num_gpus)
    assert choose_devices(parse_gpus("all")) == Refusal(reason)


def test_a_torch_without_cuda_has_no_usable_gpu(machine):
    machine(4, cuda=None)
    assert visible_gpus() == ()


@pytest.mark.parametrize("value", ["5", "0,4", "9,"])
def test_gpus_that_are_not_there_are_an_error_with_the_numbers(machine, value):
    machine(4)
    with pytest.raises(SettingsError, match=r"^XDIT_GPUS asks for GPU .* sees 4 GPUs\. Legal: all"):
        choose_devices(parse_gpus(value))


def test_another_platform_is_a_refusal_that_names_it(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert choose_devices(parse_gpus("cpu:2")) == Refusal("xDiT needs Linux; this is win32")


def test_a_torch_that_knows_pci_ids_is_asked_for_them(machine, monkeypatch):
    machine(1)
    assert pci_ids() == {}
    properties = types.SimpleNamespace(
        name="Card", uuid="1", total_memory=1, pci_domain_id=0, pci_bus_id=193, pci_device_id=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert pci_ids() == {"GPU-1": "0000:c1:00.0"}


def test_a_pair_that_the_driver_does_not_answer_for_is_left_out(machine, monkeypatch):
    machine(3)

    def can_access(a, b):
        if 2 in (a, b):
            raise RuntimeError("invalid device ordinal")
        return True

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", can_access)
    assert peer_access() == {
        ("GPU-0000-0", "GPU-0000-1"): True,
        ("GPU-0000-1", "GPU-0000-0"): True,
    }
