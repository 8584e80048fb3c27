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
from comfy_xdit_patch.host.guest.status import inactive
from comfy_xdit_patch.report import doctor
from comfy_xdit_patch.report.schema import Counts, LastError, Memory, RankStatus, Reason, Status
from comfy_xdit_patch.settings import read_settings, written

START_FILE = "comfy_xdit_patch_of_a_test.pth"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody answers


def examine(**options):
    """The report as text, and whether nothing in it is wrong."""
    report = doctor.examine(comfyui=None, **options)
    return report.text, report.num_wrong == 0


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
    report, is_well = examine(url=NOWHERE)
    assert is_well, report
    assert str(installed) in report
    assert "rank 1: cpu" in report
    assert "batch 1: ulysses=2" in report
    assert "batch 2: batch=2" in report
    assert "does not answer" in report
    assert report.endswith("Nothing is wrong.")


def test_a_missing_start_file_is_wrong(installed):
    (installed / START_FILE).unlink()
    report, is_well = examine(url=NOWHERE)
    assert f"no {START_FILE} on sys.path" in report
    assert not is_well


def test_a_wrong_setting_is_wrong_and_named(installed, monkeypatch):
    monkeypatch.setenv("XDIT_GPUS", "seven")
    report, is_well = examine(url=NOWHERE)
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
    report, is_well = examine(url=NOWHERE)
    assert batch_1 in report
    assert batch_2 in report
    assert is_well


def test_a_strategy_that_the_ranks_cannot_follow_is_wrong(installed, monkeypatch):
    monkeypatch.setenv("XDIT_STRATEGY", "ring=3")
    report, is_well = examine(url=NOWHERE)
    assert '! XDIT_STRATEGY="ring=3" does not fit 2 ranks' in report
    assert not is_well


def test_a_budget_is_planned_with_its_arithmetic(installed, monkeypatch):
    report, _ = examine(url=NOWHERE)
    assert "no budget" in report
    monkeypatch.setenv("XDIT_GPU_MEMORY", "24")
    report, is_well = examine(url=NOWHERE)
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
    report, is_well = examine(url=NOWHERE)
    assert "rank 2: PCI 0000:12:00.0, NUMA node 1" in report
    assert "link host bridges, peer-to-peer: ranks 0-1, 2-3" in report
    assert "link other socket, no peer-to-peer: ranks 0-2, 0-3, 1-2, 1-3" in report
    assert "not found out" not in report
    assert is_well


def test_links_that_nobody_knows_are_said_to_be_unknown(installed, monkeypatch):
    monkeypatch.setenv("PATH", str(installed))
    monkeypatch.setenv("XDIT_GPUS", "GPU-1111,GPU-2222")
    report, is_well = examine(url=NOWHERE)
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
    report, is_well = examine(url=NOWHERE)
    wrong = [line.strip()[2:] for line in report.splitlines() if line.startswith("  ! ")]
    assert [line.startswith(text) for line, text in zip(wrong, faults, strict=True)] == [
        True for _ in faults
    ], report
    assert is_well == (not faults)


def test_switched_off_is_not_wrong(installed, monkeypatch):
    monkeypatch.setenv("XDIT_STRATEGY", "off")
    report, is_well = examine(url=NOWHERE)
    assert "not parallel: switched off by the settings" in report
    assert is_well


def test_a_directory_that_is_no_comfyui_is_wrong(installed):
    report = doctor.examine(comfyui=str(installed), url=NOWHERE)
    assert f"{installed} is not a ComfyUI tree" in report.text
    assert report.num_wrong == 1


def test_a_server_without_the_package_is_told_from_one_that_is_off(installed, server):
    report, _ = examine(url=server(404, {}))
    assert "answers 404: it runs without comfy-xdit-patch" in report


def rank(number, **more):
    facts = {"device": "cpu", "name": "cpu", "uuid": None, "comfyui_index": None, "state": "ready"}
    facts |= {"pid": 42, "log": None, "uptime_s": 1.0, "restarts": 0, "start_s": None}
    facts |= {"load_s": None, "weight_bytes": None, "memory": Memory(), "utilisation": None}
    facts |= {"busy_share": 0.0, "forwards": 7, "step_s": None, "busy_s": None, "busy_total_s": 0.0}
    facts |= {"control_s": None, "is_launch_bound": None, "blocks_compiled": 0, "graphs": 0}
    facts |= {"replays": 0}
    return RankStatus(rank=number, **(facts | more))


def status(state="ready", **facts):
    settings = written(read_settings({"XDIT_GPUS": "cpu:2", "XDIT_STRATEGY": "ring"}))
    return Status(**{"state": state, "settings": settings, "ranks": [rank(0), rank(1)]} | facts)


def test_a_running_comfyui_is_looked_at_with_its_settings_and_not_the_shells(
    installed, server, monkeypatch
):
    monkeypatch.setenv("XDIT_GPUS", "seven")
    report, is_well = examine(url=server(200, status(settings_changed=["XDIT_GPUS"]).to_dict()))
    assert "state: ready" in report
    assert "rank 1: cpu cpu, ready, pid 42, 7 forwards, 0 restarts" in report
    assert "XDIT_GPUS = cpu:2, changed since it started (this shell has seven)" in report
    assert "XDIT_STRATEGY = ring (this shell has auto)" in report
    assert "batch 1: ring=2" in report
    assert is_well, report


def test_what_fell_back_is_said_with_its_remedy_and_what_was_chosen_is_no_fault(installed, server):
    counts = Counts(steps_parallel=7, steps_fell_back=2, steps_chose_one_gpu=5)
    reasons = [Reason("a worker was lost", 2, "Look below.")]
    body = status(totals=counts, fell_back=reasons).to_dict()
    report, is_well = examine(url=server(200, body))
    assert "7 steps parallel, 2 fell back" in report
    assert "fell back 2 times: a worker was lost" in report
    assert "what to do: Look below." in report
    assert "5 steps on one GPU, which auto had found to be the faster" in report
    assert is_well, report


@pytest.mark.parametrize("state", ["broken", "refused"])
def test_a_comfyui_with_broken_ranks_or_that_refused_is_wrong(installed, server, capsys, state):
    ranks = {"ranks": []} if state == "refused" else {}
    body = status(state, reason="Rank 1 is gone.", remedy="Mend it.", **ranks).to_dict()
    url = server(200, body)
    report, is_well = examine(url=url)
    assert f"! state: {state}, Rank 1 is gone." in report
    assert "what to do: Mend it." in report
    assert not is_well
    assert main(["doctor", "--url", url, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["is_well"] is False
    assert said["server"] == body
    wrong = [x["text"] for each in said["sections"] for x in each["lines"] if x["is_wrong"]]
    assert wrong == [f"state: {state}, Rank 1 is gone."]


@pytest.mark.parametrize(
    ("state", "reason", "remedy"),
    [
        ("off", "no usable GPU is visible", "tries the package out without a GPU"),
        ("off", "one GPU is visible, nothing to share", "tries the package out without a GPU"),
        ("refused", 'XDIT_GPUS="7,8" is not legal. Legal: all.', "Correct or unset the variable"),
        (
            "refused",
            "this ComfyUI does not fit: comfy.sd.load is missing (No module named 'comfy.sd')",
            "Report the ComfyUI version and the line",
        ),
    ],
)
def test_what_keeps_it_from_running_is_said_with_its_remedy(
    installed, server, state, reason, remedy
):
    report, is_well = examine(url=server(200, inactive(state, reason).to_dict()))
    assert f"state: {state}, {reason}" in report
    assert remedy in report
    assert is_well == (state == "off"), report


def test_a_reason_that_is_the_last_error_is_said_once(installed, server):
    text = "Rank 1 is gone."
    body = status("broken", reason=text, last_error=LastError(text, 1.0)).to_dict()
    assert examine(url=server(200, body))[0].count(text) == 1
    body = status(last_error=LastError(text, 1.0)).to_dict()
    assert f"last error: {text}" in examine(url=server(200, body))[0]


def test_the_short_form_for_other_machines_is_judged_too(installed, server):
    report, is_well = examine(url=server(200, status().short()))
    assert "2 ranks, 0 steps parallel, 0 fell back" in report
    assert "XDIT_STATUS=all" in report
    assert "Settings of this shell" in report
    assert is_well, report
    assert not examine(url=server(200, status("broken").short()))[1]


@pytest.mark.parametrize("schema", [{}, {"schema": 2}])
def test_a_server_of_another_schema_is_wrong(installed, server, schema):
    body = {"version": "0.0.9", "state": "ready", "reason": None, "ranks": [{}], **schema}
    report, is_well = examine(url=server(200, body))
    assert "! answers as comfy-xdit-patch 0.0.9 does, with a status of schema" in report
    assert not is_well


@pytest.mark.parametrize("body", [[], {}, {"message": "hello"}])
def test_another_server_that_answers_is_no_reason_to_fail(installed, server, body):
    report, _ = examine(url=server(200, body))
    assert "Running ComfyUI" in report


def test_the_exit_status_says_whether_anything_is_wrong(installed, capsys):
    assert main(["doctor", "--url", NOWHERE]) == 0
    (installed / START_FILE).unlink()
    assert main(["doctor", "--url", NOWHERE]) == 1
    assert START_FILE in capsys.readouterr().out
