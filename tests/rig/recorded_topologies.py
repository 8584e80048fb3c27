"""What ``nvidia-smi topo`` says on real machines: their tables, as published.

Runs in: the tests.

Each names where its table stands. The legend below the tables is left out, but for one.
"""

from __future__ import annotations

# HazyResearch/ThunderKittens#167: 8 H100 on NVSwitches, two sockets.
H100_8 = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tGPU5\tGPU6\tGPU7\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\t0-47,96-143\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\t0-47,96-143\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNV18\tNV18\tNV18\tNV18\tNV18\t0-47,96-143\t0\t\tN/A
GPU3\tNV18\tNV18\tNV18\t X \tNV18\tNV18\tNV18\tNV18\t0-47,96-143\t0\t\tN/A
GPU4\tNV18\tNV18\tNV18\tNV18\t X \tNV18\tNV18\tNV18\t48-95,144-191\t1\t\tN/A
GPU5\tNV18\tNV18\tNV18\tNV18\tNV18\t X \tNV18\tNV18\t48-95,144-191\t1\t\tN/A
GPU6\tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\t X \tNV18\t48-95,144-191\t1\t\tN/A
GPU7\tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\tNV18\t X \t48-95,144-191\t1\t\tN/A
"""

# NVIDIA/go-gpuallocator#17: 8 4090 on two sockets, two network cards. SYS also within a node.
RTX4090_8 = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tGPU5\tGPU6\tGPU7\tNIC0\tNIC1\tCPU Affinity\
\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\t0-55,112-167\t0\t\tN/A
GPU1\tSYS\t X \tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\t0-55,112-167\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\t0-55,112-167\t0\t\tN/A
GPU3\tSYS\tSYS\tSYS\t X \tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\t0-55,112-167\t0\t\tN/A
GPU4\tSYS\tSYS\tSYS\tSYS\t X \tSYS\tSYS\tSYS\tSYS\tSYS\t56-111,168-223\t1\t\tN/A
GPU5\tSYS\tSYS\tSYS\tSYS\tSYS\t X \tSYS\tSYS\tSYS\tSYS\t56-111,168-223\t1\t\tN/A
GPU6\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\t X \tSYS\tPHB\tPHB\t56-111,168-223\t1\t\tN/A
GPU7\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\t X \tSYS\tSYS\t56-111,168-223\t1\t\tN/A
NIC0\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tPHB\tSYS\t X \tPIX
NIC1\tSYS\tSYS\tSYS\tSYS\tSYS\tSYS\tPHB\tSYS\tPIX\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  PHB  = Connection traversing PCIe as well as a PCIe Host Bridge (typically the CPU)

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""

# warpem/miss-alignment#106: 4 L40S on two sockets, as somebody copied it out of a terminal.
L40S_4 = """\
        GPU0    GPU1    GPU2    GPU3    NIC0    NIC1    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      NODE    SYS     SYS     SYS     SYS     0-95,192-287    0               N/A
GPU1    NODE     X      SYS     SYS     SYS     SYS     0-95,192-287    0               N/A
GPU2    SYS     SYS      X      NODE    NODE    NODE    96-191,288-383  1               N/A
GPU3    SYS     SYS     NODE     X      NODE    NODE    96-191,288-383  1               N/A
NIC0    SYS     SYS     NODE    NODE     X      PIX
NIC1    SYS     SYS     NODE    NODE    PIX      X
"""

# NVIDIA/nccl#667: 4 GPUs behind PCIe switches, where peer-to-peer hangs.
SWITCHES_4 = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity
GPU0\t X \tPXB\tSYS\tSYS\t0-27,56-83\t0
GPU1\tPXB\t X \tSYS\tSYS\t0-27,56-83\t0
GPU2\tSYS\tSYS\t X \tPIX\t28-55,84-111\t1
GPU3\tSYS\tSYS\tPIX\t X \t28-55,84-111\t1
"""

# noonghunna/club-3090#1229: 2 GeForce cards (5090) on one CPU; 4090s have the same two tables.
GEFORCE_2 = """\
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tPHB\t0-63\t0\t\tN/A
GPU1\tPHB\t X \t0-63\t0\t\tN/A
"""
GEFORCE_2_PEERS = """\
 \tGPU0\tGPU1\t
 GPU0\tX\tGNS\t
 GPU1\tGNS\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  GNS  = GPU not supported
"""

# Project-HAMi/HAMi#99: 1 GPU, and a system that knows no NUMA nodes.
TESLA_1 = """\
\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \t0-7\t\tN/A\t\tN/A
"""

# kubernetes/kubernetes#53497, of 2017: no NUMA nodes in the table yet.
OLD_3 = """\
        GPU0    GPU1    GPU2    mlx4_0  CPU Affinity
GPU0     X      PIX     SYS     PHB     0-9,20-29
GPU1    PIX      X      SYS     PHB     0-9,20-29
GPU2    SYS     SYS      X      SYS     10-19,30-39
"""

TOPOLOGIES = {
    "8xh100": H100_8,
    "8x4090": RTX4090_8,
    "4xl40s": L40S_4,
    "4 behind switches": SWITCHES_4,
    "2 GeForce": GEFORCE_2,
    "1 GPU": TESLA_1,
    "2017": OLD_3,
}


def listing(num_gpus: int) -> str:
    """What ``nvidia-smi --query-gpu=index,uuid,pci.bus_id`` says of so many."""
    return "".join(f"{i}, {uuid_of(i)}, 00000000:{0x10 + i:02X}:00.0\n" for i in range(num_gpus))


def uuid_of(number: int) -> str:
    return f"GPU-0000000{number}-aaaa-bbbb-cccc-dddddddddddd"
