"""Settings that this machine cannot serve are told, and not found out at the first image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from comfy_xdit_patch.errors import Refusal, SettingsError
from comfy_xdit_patch.hardware import chosen_devices as devices
from comfy_xdit_patch.settings import read_settings


def devices_of(**variables):
    return devices.devices_of(read_settings(variables))


@pytest.fixture
def listing(tmp_path, monkeypatch):
    """``listing("GPU-1a2b", ...)``: nvidia-smi lists these."""

    def write(*uuids):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            "#!/bin/sh\n"
            + "".join(f"echo {n}, {u}, 00000000:0{n}:00.0\n" for n, u in enumerate(uuids))
        )
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return write


@pytest.mark.parametrize("variables", [{"XDIT_GPUS": "0"}, {"XDIT_STRATEGY": "off"}])
def test_off_is_a_refusal(variables):
    assert devices_of(**variables) == Refusal("switched off by the settings")


def test_as_many_cpu_ranks_as_machines_have_gpus_can_be_tried_anywhere(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert len(devices_of(XDIT_GPUS="cpu:8")) == 8


def test_cpu_ranks_are_no_more_than_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert len(devices_of(XDIT_GPUS="cpu:12")) == 12
    with pytest.raises(SettingsError, match=r"^XDIT_GPUS=cpu:200 .* which is 12: it has 12 cores"):
        devices_of(XDIT_GPUS="cpu:200")
    monkeypatch.setattr(devices, "available_bytes", lambda: 1 << 30)
    with pytest.raises(SettingsError, match=r"which is 4: .* and 1\.0 GiB of free memory\. Legal"):
        devices_of(XDIT_GPUS="cpu:12")
    monkeypatch.setattr(devices, "available_bytes", lambda: 0)
    assert len(devices_of(XDIT_GPUS="cpu:1")) == 1


def test_uuids_of_gpus_that_are_there_are_taken_by_their_beginning(listing):
    listing("GPU-1a2b3c", "GPU-4d5e6f")
    found = devices_of(XDIT_GPUS="GPU-4D5E,GPU-1a2b3c")
    assert [device.uuid for device in found] == ["GPU-4D5E", "GPU-1a2b3c"]


@pytest.mark.parametrize("value", ["GPU-9999,GPU-1a2b3c", "GPU-1a2b"])
def test_a_uuid_of_no_gpu_or_of_several_is_told_with_those_that_there_are(listing, value):
    listing("GPU-1a2b3c", "GPU-1a2b77")
    wrong = value.split(",")[0]
    with pytest.raises(SettingsError, match=rf"names {wrong}, .* GPU-1a2b3c, GPU-1a2b77\. Legal"):
        devices_of(XDIT_GPUS=value)


def test_where_the_driver_says_nothing_uuids_are_taken_as_they_are(listing, tmp_path):
    assert Path(os.environ["PATH"]) == tmp_path
    assert len(devices_of(XDIT_GPUS="GPU-1a2b,GPU-3c4d")) == 2
