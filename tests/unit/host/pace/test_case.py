"""What makes a measurement another machine's: its cards, and the programs on them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pace import case
from comfy_xdit_patch.host.pace.case import comfyui_version, machine_text

CARDS = (Device("NVIDIA L20", "GPU-1"), Device("NVIDIA L20", "GPU-2"))


@pytest.fixture
def comfyui(tmp_path):
    (tmp_path / "comfyui_version.py").write_text('# a comment\n__version__ = "0.99.0"\n')
    return tmp_path


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(case, "driver_version", lambda: "580.65.06")


def text(devices=CARDS, *, torch="2.9.0", threads=8, comfyui=None, transfer_dtype="exact"):
    return machine_text(
        devices,
        torch_version=torch,
        num_threads=threads,
        comfyui=comfyui,
        transfer_dtype=transfer_dtype,
    )


def test_cards_are_told_by_their_uuids_and_versions_by_their_numbers(comfyui):
    assert text(comfyui=comfyui).startswith(
        "NVIDIA L20 (GPU-1), NVIDIA L20 (GPU-2), driver 580.65.06, ComfyUI 0.99.0, torch 2.9.0, "
        "comfy-xdit-patch "
    )


def test_another_card_order_driver_torch_or_comfyui_is_another_machine(comfyui, monkeypatch):
    found = [
        text(comfyui=comfyui),
        text(CARDS[::-1], comfyui=comfyui),
        text((CARDS[0], replace(CARDS[1], uuid="GPU-3")), comfyui=comfyui),
        text(torch="2.8.0", comfyui=comfyui),
        *(text(comfyui=comfyui, transfer_dtype=dtype) for dtype in ("int8", "fp8")),
    ]
    monkeypatch.setattr(case, "driver_version", lambda: None)
    found.append(text(comfyui=comfyui))
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.99.1"')
    found.append(text(comfyui=comfyui))
    assert len({*found}) == len(found)


def test_cpu_ranks_are_told_by_the_cores_and_threads_there_are(monkeypatch):
    monkeypatch.setattr(case.os, "sched_getaffinity", lambda pid: {5, 3})
    found = text((Device("cpu"), Device("cpu")))
    assert found.startswith("2 x cpu, cores 3,5, 8 threads in ComfyUI, torch 2.9.0, ")
    assert "driver" not in found


def test_a_comfyui_without_a_version_has_none(comfyui):
    assert comfyui_version(comfyui) == "0.99.0"
    assert comfyui_version(comfyui / "comfy") is None
    assert "ComfyUI" not in text(comfyui=comfyui / "comfy")
    (comfyui / "comfyui_version.py").write_text("version = [")
    assert comfyui_version(comfyui) is None
