"""The doctor says what it found, and whether anything is wrong."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest
from rig import recorded_topologies as recorded

from comfy_xdit_patch.__main__ import main
from comfy_xdit_patch.report import doctor
from comfy_xdit_patch.report.doctor import examine

START_FILE = "comfy_xdit_patch_of_a_test.pth"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody answers


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The start file, under a name of its own, is on ``sys.path``; two CPU ranks are asked for."""
    monkeypatch.setattr(doctor, "START_FILE", START_FILE)
    (tmp_path / START_FILE).touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("XDIT_GPUS", "cpu:2")
    return tmp_path


@pytest.fixture
def server():
    """``server(404, {...})``: the URL of something that answers every request like this."""
    running = []

    def start(code, body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_):
                pass

        running.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.01,)).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


def test_a_good_installation_is_well(installed):
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert is_well, report
    assert str(installed) in report
    assert "rank 1: cpu" in report
    assert "batch 1: ulysses=2" in report
    assert "batch 2: batch=2" in report
    assert "does not answer" in report
    assert report.endswith("Nothing is wrong.")


def test_a_missing_start_file_is_wrong(installed):
    (installed / START_FILE).unlink()
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert f"no {START_FILE} on sys.path" in report
    assert not is_well


def test_a_wrong_setting_is_wrong_and_named(installed, monkeypatch):
    monkeypatch.setenv("XDIT_GPUS", "seven")
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert '! XDIT_GPUS="seven" is not legal.' in report
    assert not is_well


@pytest.mark.parametrize(
    ("strategy", "batch_1", "batch_2"),
    [
        ("ring", "batch 1: ring=2", "batch 2: ring=2"),
        ("cfg=2", "batch 1: one GPU, XDIT_STRATEGY wants the batch in 2", "batch 2: batch=2"),
    ],
)
def test_the_plan_is_that_of_the_strategy(installed, monkeypatch, strategy, batch_1, batch_2):
    monkeypatch.setenv("XDIT_STRATEGY", strategy)
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert batch_1 in report
    assert batch_2 in report
    assert is_well


def test_a_strategy_that_the_ranks_cannot_follow_is_wrong(installed, monkeypatch):
    monkeypatch.setenv("XDIT_STRATEGY", "ring=3")
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert '! XDIT_STRATEGY="ring=3" does not fit 2 ranks' in report
    assert not is_well


def test_a_budget_is_planned_with_its_arithmetic(installed, monkeypatch):
    report, _ = examine(comfyui=None, url=NOWHERE)
    assert "no budget" in report
    monkeypatch.setenv("XDIT_GPU_MEMORY", "24")
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert "budget: 24.0 GiB on each card" in report
    assert "modulation shared over the ranks, all else on every card: 21.4 of" in report
    assert is_well


def test_links_of_gpus_are_printed_as_nvidia_smi_has_them(installed, monkeypatch):
    for name, text in (
        ("listing", recorded.listing(4)),
        ("links", recorded.L40S_4),
        ("peers", recorded.L40S_4.replace("SYS ", "CNS ").replace("NODE", "OK")),
    ):
        (installed / name).write_text(text)
    program = installed / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$2" in -m) f=links;; -p2p) f=peers;; *) f=listing;; esac\n'
        f'while IFS= read -r line; do echo "$line"; done < {installed}/$f\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(installed))
    monkeypatch.setenv("XDIT_GPUS", ",".join(recorded.uuid_of(i) for i in range(4)))
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert "rank 2: PCI 0000:12:00.0, NUMA node 1" in report
    assert "link host bridges, peer-to-peer: ranks 0-1, 2-3" in report
    assert "link other socket, no peer-to-peer: ranks 0-2, 0-3, 1-2, 1-3" in report
    assert "not found out" not in report
    assert is_well


def test_links_that_nobody_knows_are_said_to_be_unknown(installed, monkeypatch):
    monkeypatch.setenv("PATH", str(installed))
    monkeypatch.setenv("XDIT_GPUS", "GPU-1111,GPU-2222")
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert "rank 0: PCI unknown, NUMA node unknown" in report
    assert "link unknown, peer-to-peer unknown: ranks 0-1" in report
    assert "not found out: nvidia-smi topo: it is not installed, or not on PATH" in report
    assert is_well, "unknown is not wrong"


@pytest.mark.parametrize(
    ("mode", "size_mib", "peers", "faults"),
    [
        ("Default", 64, "OK", []),
        ("Default", 64, "NS", ["/dev/shm has 64 MiB"]),
        ("Default", 2048, "NS", []),
        ("Exclusive_Process", 64, "OK", ["rank 0: compute mode", "rank 1: compute mode"]),
    ],
)
def test_what_keeps_processes_from_sharing_gpus_is_wrong(
    installed, monkeypatch, mode, size_mib, peers, faults
):
    uuids = [recorded.uuid_of(i) for i in range(2)]
    table = f"\tGPU0\tGPU1\nGPU0\tX\t{peers}\nGPU1\t{peers}\tX\n"
    modes = "".join(f"{uuid}, {mode}\n" for uuid in uuids)
    for name, text in (("listing", recorded.listing(2)), ("modes", modes), ("topo", table)):
        (installed / name).write_text(text)
    program = installed / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in topo) f=topo;; *compute_mode) f=modes;; *) f=listing;; esac\n'
        f'while IFS= read -r line; do echo "$line"; done < {installed}/$f\n'
    )
    program.chmod(0o755)
    size = SimpleNamespace(f_frsize=4096, f_blocks=size_mib << 8)
    monkeypatch.setattr(os, "statvfs", lambda _: size)
    monkeypatch.setenv("PATH", str(installed))
    monkeypatch.setenv("XDIT_GPUS", ",".join(uuids))
    report, is_well = examine(comfyui=None, url=NOWHERE)
    wrong = [line.strip()[2:] for line in report.splitlines() if line.startswith("  ! ")]
    assert [line.startswith(text) for line, text in zip(wrong, faults, strict=True)] == [
        True for _ in faults
    ], report
    assert is_well == (not faults)


def test_switched_off_is_not_wrong(installed, monkeypatch):
    monkeypatch.setenv("XDIT_STRATEGY", "off")
    report, is_well = examine(comfyui=None, url=NOWHERE)
    assert "not parallel: switched off by the settings" in report
    assert is_well


def test_a_directory_that_is_no_comfyui_is_wrong(installed):
    report, is_well = examine(comfyui=str(installed), url=NOWHERE)
    assert f"{installed} is not a ComfyUI tree" in report
    assert not is_well


def test_a_server_without_the_package_is_told_from_one_that_is_off(installed, server):
    report, _ = examine(comfyui=None, url=server(404, {}))
    assert "answers 404: it runs without comfy-xdit-patch" in report


def test_a_running_comfyui_is_asked_for_its_status(installed, server):
    rank = {"rank": 0, "pid": 42, "device": "cpu", "state": "ready", "forwards": 7}
    status = {
        "version": "0.1.0",
        "state": "ready",
        "reason": None,
        "ranks": [rank],
        "steps_parallel": 7,
        "steps_fell_back": 2,
        "fall_back_reasons": {"a ControlNet is active": 2},
    }
    report, _ = examine(comfyui=None, url=server(200, status))
    assert "state: ready" in report
    assert "rank 0: pid 42, cpu, ready, 7 forwards" in report
    assert "7 steps parallel, 2 fell back" in report
    assert "fell back 2 times: a ControlNet is active" in report


def test_a_comfyui_in_which_the_package_refused_says_why(installed, server):
    status = {"version": "0.1.0", "state": "refused", "reason": "no usable GPU is visible"}
    report, _ = examine(comfyui=None, url=server(200, status))
    assert "state: refused, no usable GPU is visible" in report


@pytest.mark.parametrize("body", [[], {}, {"message": "hello"}])
def test_another_server_that_answers_is_no_reason_to_fail(installed, server, body):
    report, _ = examine(comfyui=None, url=server(200, body))
    assert "Running ComfyUI" in report


def test_the_exit_status_says_whether_anything_is_wrong(installed, capsys):
    assert main(["doctor", "--url", NOWHERE]) == 0
    (installed / START_FILE).unlink()
    assert main(["doctor", "--url", NOWHERE]) == 1
    assert START_FILE in capsys.readouterr().out
