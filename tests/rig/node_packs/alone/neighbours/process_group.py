"""A pack that has torch.distributed for itself, and leaves it, with the variables of a launcher.

Runs in: a ComfyUI process of a test server.
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]

# They stay: whoever starts a process from here hands them on.
os.environ |= {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(port),
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
}
dist.init_process_group("gloo")


def counts() -> dict[str, int]:
    """Whether the group is there and works."""
    total = torch.ones(1)
    dist.all_reduce(total)
    return {"process_group": int(total.item()) * dist.get_world_size()}
