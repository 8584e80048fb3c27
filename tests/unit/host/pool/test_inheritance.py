"""What a worker inherits from the host."""

from __future__ import annotations

import json
import os
import sys
import types
from types import SimpleNamespace

import pytest

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool.inheritance import (
    ALLOCATOR_VARIABLES,
    capture_host_state,
    is_peer_to_peer_off,
    worker_variables,
)
from comfy_xdit_patch.marks import WORKER_MARK
from comfy_xdit_patch.wire.messages.requests import Start
from comfy_xdit_patch.worker.joining import restore_host_state

CPU = Device(name="cpu")
GPU = Device(name="Card", uuid="GPU-1a2b")
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def test_a_gpu_worker_sees_its_gpu_only(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert worker_variables(GPU, cpu_threads=1)["CUDA_VISIBLE_DEVICES"] == "GPU-1a2b"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
@pytest.mark.parametrize(
    ("given", "options"),
    [
        (None, "expandable_segments:True"),
        ("backend:cudaMallocAsync", "expandable_segments:True"),
        ("backend:native,max_split_size_mb:64", "max_split_size_mb:64,expandable_segments:True"),
        ("expandable_segments:False", "expandable_segments:False"),
        (
            "roundup_power2_divisions:[256:1,512:2,>:8],backend:cudaMallocAsync",
            "roundup_power2_divisions:[256:1,512:2,>:8],expandable_segments:True",
        ),
    ],
)
def test_a_gpu_worker_has_torchs_own_allocator_with_the_users_options(
    monkeypatch, name, given, options
):
    for either in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(either, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    variables = worker_variables(GPU, cpu_threads=1)
    found = {either: variables.get(either) for either in ALLOCATOR_VARIABLES}
    assert found == {"PYTORCH_CUDA_ALLOC_CONF": options, "PYTORCH_ALLOC_CONF": None}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("OMP_NUM_THREADS", "4"),
        ("NCCL_LAUNCH_ORDER_IMPLICIT", "1"),
        ("NCCL_GRAPH_REGISTER", "0"),
    ],
)
def test_a_gpu_worker_has_our_choice_unless_the_user_made_one(monkeypatch, name, ours):
    monkeypatch.delenv(name, raising=False)
    assert worker_variables(GPU, cpu_threads=1)[name] == ours
    monkeypatch.setenv(name, "0")
    assert worker_variables(GPU, cpu_threads=1)[name] == "0"


def test_a_cpu_worker_has_the_threads_it_was_given(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    variables = worker_variables(CPU, cpu_threads=3)
    assert (variables["OMP_NUM_THREADS"], variables["MKL_NUM_THREADS"]) == ("3", "3")


def test_a_worker_does_without_peer_to_peer_where_it_is_told_to(monkeypatch):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert "NCCL_P2P_DISABLE" not in worker_variables(GPU, cpu_threads=1)
    without = worker_variables(GPU, cpu_threads=1, peer_to_peer=False)
    assert without["NCCL_P2P_DISABLE"] == "1"


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("0", False), ("", False)])
def test_a_user_who_switched_peer_to_peer_off_is_heard(monkeypatch, value, is_off):
    monkeypatch.setenv("NCCL_P2P_DISABLE", value)
    assert is_peer_to_peer_off() == is_off
    assert worker_variables(GPU, cpu_threads=1)["NCCL_P2P_DISABLE"] == value


@pytest.mark.parametrize("device", [CPU, GPU])
def test_every_worker_is_marked_so_that_it_does_not_start_workers_itself(device):
    assert worker_variables(device, cpu_threads=1)[WORKER_MARK] == "1"


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_worker_does_not_join_the_job_of_another_launcher(monkeypatch, device):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "7")
    variables = worker_variables(device, cpu_threads=1)
    assert not set(LAUNCHER_VARIABLES) & set(variables)


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_nothing_listens_beyond_loopback_unless_the_user_says_so(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    assert worker_variables(GPU, cpu_threads=1)[name] == "lo"
    monkeypatch.setenv(name, "eth7")
    assert worker_variables(GPU, cpu_threads=1)[name] == "eth7"


def test_other_variables_are_inherited_and_the_hosts_own_are_not_changed(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models/hf")
    before = dict(os.environ)
    assert worker_variables(GPU, cpu_threads=1)["HF_HOME"] == "/models/hf"
    assert dict(os.environ) == before


@pytest.fixture
def comfy(monkeypatch):
    """ComfyUI's options and the two modules that a worker imports."""
    package = types.ModuleType("comfy")
    monkeypatch.setitem(sys.modules, "comfy", package)
    for name in ("options", "cli_args", "model_management", "sd"):
        module = types.ModuleType(f"comfy.{name}")
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    package.options.args_parsing = True
    package.options.enable_args_parsing = lambda: setattr(package.options, "enabled", True)
    package.cli_args.args = SimpleNamespace()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["main.py", "--cpu"])
    return package


def test_the_hosts_plain_options_are_captured_and_the_rest_is_left_to_the_command_line(comfy):
    comfy.cli_args.args = SimpleNamespace(
        cpu=True,
        reserve_vram=None,
        listen="127.0.0.1",
        disable=["a", "b"],
        fast={"fp16"},
        x=object(),
    )
    state = capture_host_state("/ComfyUI")
    assert state.arguments == {
        "cpu": True,
        "reserve_vram": None,
        "listen": "127.0.0.1",
        "disable": ["a", "b"],
    }
    assert (state.comfyui_root, state.argv, state.parses_arguments) == (
        "/ComfyUI",
        ["main.py", "--cpu"],
        True,
    )
    assert state.sys_path == sys.path
    json.dumps(state.arguments)


def start(**changes):
    values = {
        "comfyui_root": "/ComfyUI",
        "sys_path": ["/ComfyUI", "/packages"],
        "argv": ["main.py", "--bf16-unet"],
        "parses_arguments": True,
        "arguments": {"bf16_unet": True},
        "num_threads": 1,
        "world_size": 2,
        "join_timeout_s": 1.0,
        "step_timeout_s": 1.0,
    }
    return Start(**{**values, **changes})


def test_a_worker_gets_the_hosts_search_path_command_line_and_options(comfy):
    restore_host_state(start())
    assert sys.path == ["/ComfyUI", "/packages"]
    assert sys.argv == ["main.py", "--bf16-unet"]
    assert comfy.options.enabled
    assert comfy.cli_args.args.bf16_unet is True


def test_a_worker_pins_nothing_for_its_weights_are_pages_of_a_shared_file(comfy):
    restore_host_state(start(arguments={"disable_pinned_memory": False}))
    assert comfy.cli_args.args.disable_pinned_memory is True


def test_comfyuis_directory_is_put_on_the_search_path_if_it_is_not_there(comfy):
    restore_host_state(start(sys_path=["/packages"]))
    assert sys.path == ["/ComfyUI", "/packages"]


def test_the_command_line_is_not_parsed_where_the_host_did_not_parse_it(comfy):
    restore_host_state(start(parses_arguments=False))
    assert not hasattr(comfy.options, "enabled")
