"""What a worker inherits from the host: variables, module search path, ComfyUI's own options.

Runs in: host. ``joining.py`` has the worker's side.

A worker must compute with ComfyUI's own code under the host's own options, so that ops, attention
backend and dtype rules are the host's. What crosses is a hand-picked list, all of it plain data.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.marks import WORKER_MARK
from comfy_xdit_patch.wire.messages.requests import is_plain

# ``torchrun`` and other launchers leave these behind; a worker must not join somebody else's job.
_FOREIGN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
NO_PEER_TO_PEER = "NCCL_P2P_DISABLE"
"""NCCL's own variable: data between two GPUs then goes through CPU memory."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The second is torch's newer name for the first."""
GPU_THREADS = "4"
"""Of a GPU rank's OpenMP pool. By default each rank would start one for every core of the machine,
and all of them spin for a while after what a load computes on the CPU."""


@dataclass(frozen=True, slots=True)
class HostState:
    """What every worker of a pool is told about the host's ComfyUI."""

    comfyui_root: str
    sys_path: list[str]
    argv: list[str]
    parses_arguments: bool
    arguments: dict[str, Any]


def capture_host_state(comfyui_root: str) -> HostState:
    """Read ComfyUI's options in the host, after ComfyUI parsed them.

    Options with values that are not plain (enumerations, sets) come from parsing the same command
    line again; plain ones are laid over, since main.py and node packs change some at run time.
    """
    import comfy.cli_args
    import comfy.options

    return HostState(
        comfyui_root=comfyui_root,
        sys_path=[path for path in sys.path if isinstance(path, str)],
        argv=list(sys.argv),
        parses_arguments=bool(comfy.options.args_parsing),
        arguments=plain_arguments(vars(comfy.cli_args.args)),
    )


def plain_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ComfyUI's options that are plain data."""
    return {name: value for name, value in options.items() if is_plain(value)}


def is_peer_to_peer_off() -> bool:
    """Whether the user has NCCL do without peer-to-peer already."""
    return os.environ.get(NO_PEER_TO_PEER, "0").strip() not in ("", "0")


def worker_variables(
    device: Device, *, cpu_threads: int, peer_to_peer: bool = True
) -> dict[str, str]:
    """Return the environment of one worker.

    GPU: exactly one device, named by UUID, since CUDA's, NVML's and the host's numbers differ, and
    torch's own allocator (``_allocator_options``).
    CPU: thread counts must be set before torch starts its thread pools.
    """
    variables = dict(os.environ)
    for name in _FOREIGN_VARIABLES:
        variables.pop(name, None)
    variables[WORKER_MARK] = "1"
    # Nothing of ours listens beyond loopback. A user's own choice stands.
    variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    variables.setdefault("NCCL_SOCKET_IFNAME", "lo")
    variables["PYTHONUNBUFFERED"] = "1"
    if not peer_to_peer:
        variables[NO_PEER_TO_PEER] = "1"
    if device.uuid is None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            variables[name] = str(cpu_threads)
        variables["CUDA_VISIBLE_DEVICES"] = ""
    else:
        variables["CUDA_VISIBLE_DEVICES"] = device.uuid
        variables.setdefault("OMP_NUM_THREADS", GPU_THREADS)
        # Weight shards and stages have communicators of their own beside the sequence's. All ranks
        # launch in one order, and this has NCCL keep to it, without which they may deadlock.
        variables.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        # The memory of a CUDA graph is its rank's own: no other rank's graph is tied to it.
        variables.setdefault("NCCL_GRAPH_REGISTER", "0")
        options = _allocator_options(variables)
        for name in ALLOCATOR_VARIABLES:
            variables.pop(name, None)
        variables[ALLOCATOR_VARIABLES[0]] = options
    return variables


def _allocator_options(variables: Mapping[str, str]) -> str:
    """The user's options of torch's allocator, but for the backend that ComfyUI put there.

    Shares that move, and images of changing size, leave a card in pieces; segments that can grow
    do not. (They rule out sharing tensors between processes by CUDA, which nothing here does.)
    """
    given = next((variables[name] for name in ALLOCATOR_VARIABLES[::-1] if name in variables), "")
    outside_of_brackets = r",(?![^\[]*\])"
    options = [item.strip() for item in re.split(outside_of_brackets, given) if item.strip()]
    options = [item for item in options if not item.startswith("backend:")]
    if not any(item.startswith("expandable_segments:") for item in options):
        options.append("expandable_segments:True")
    return ",".join(options)
