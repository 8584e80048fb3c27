"""Ask the system which GPUs there are and what lies between them.

Runs in: host, and the doctor's process. Nothing here fails: what cannot be found out is unknown,
and said to be. torch is asked in ``devices.py``, the kernel and ``nvidia-smi`` here.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from comfy_xdit_patch.hardware.devices import Device, pci_ids, peer_access
from comfy_xdit_patch.hardware.interconnect import (
    Interconnect,
    Matrix,
    Pair,
    Place,
    interconnect_of,
    parse_gpus,
    parse_matrix,
    parse_numa_node,
)

ASK_S = 5.0
"""Of all questions together. nvidia-smi takes seconds where it has to wake the driver."""
POLL_S = 0.02
MAX_CHARS = 100_000
PCI_DEVICES = Path("/sys/bus/pci/devices")

QUERY = ("--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader")
LINKS = ("topo", "-m")
PEERS = ("topo", "-p2p", "r")

Poll = Callable[[], None]


def survey(devices: Sequence[Device], *, poll: Poll = lambda: None) -> Interconnect:
    """Find out where these devices are.

    Args:
        poll: called about every 20 ms; an exception that it raises ends the wait.
    """
    if all(device.is_cpu for device in devices):
        return interconnect_of([Place(device.name, None) for device in devices], words={}, peers={})
    unknown: list[str] = []
    end = time.monotonic() + ASK_S

    def ask(arguments: Sequence[str]) -> str:
        answer = _nvidia_smi(arguments, end=end, poll=poll)
        if isinstance(answer, str):
            return answer
        unknown.append(f"nvidia-smi {arguments[0]}: {answer}")
        return ""

    listed = parse_gpus(ask(QUERY))
    links, peers = parse_matrix(ask(LINKS)), parse_matrix(ask(PEERS))
    uuids = {number: uuid for number, (uuid, _) in listed.items()}
    addresses = {uuid: pci_id for uuid, pci_id in listed.values() if pci_id} | pci_ids()
    nodes = {uuids[number]: node for number, node in links.numa_nodes.items() if number in uuids}
    places = []
    for device in devices:
        pci_id = addresses.get(device.uuid or "")
        node = _numa_node(pci_id)
        node = nodes.get(device.uuid or "") if node is None else node
        places.append(Place(device.name, device.uuid, pci_id, node))
    said = {pair: word == "OK" for pair, word in _by_uuid(peers, uuids).items()}
    return interconnect_of(
        places,
        words=_by_uuid(links, uuids),
        peers=said | peer_access(),
        unknown=unknown,
    )


def query_gpus(fields: str) -> list[list[str]]:
    """Ask for fields as ``nvidia-smi --help-query-gpu`` names them: a row for each GPU, or none.

    Numbers are without their units, which are MiB.
    """
    arguments = (f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    answer = _nvidia_smi(arguments, end=time.monotonic() + ASK_S, poll=lambda: None)
    lines = answer.splitlines() if isinstance(answer, str) else []
    return [[item.strip() for item in line.split(",")] for line in lines]


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if unknown."""
    rows = query_gpus("driver_version")
    return rows[0][0] if rows and rows[0] else None


def known_uuids() -> set[str]:
    """UUIDs of all GPUs of the machine, hidden ones too; empty if unknown."""
    return {row[1] for row in query_gpus("index,uuid,pci.bus_id") if len(row) == 3}


def compute_modes() -> dict[str, str]:
    """Ask for the compute mode of every GPU, such as ``Default``, by UUID; empty if unknown."""
    return {row[0]: row[1] for row in query_gpus("uuid,compute_mode") if len(row) == 2}


class _NoAnswer:
    """Why a question has no answer."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __str__(self) -> str:
        return self._why


def _nvidia_smi(arguments: Sequence[str], *, end: float, poll: Poll) -> str | _NoAnswer:
    program = shutil.which("nvidia-smi")
    if program is None:
        return _NoAnswer("it is not installed, or not on PATH")
    try:
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        return _NoAnswer(str(error))
    try:
        while time.monotonic() < end:
            try:
                text, _ = process.communicate(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                poll()
                continue
            if process.returncode:
                return _NoAnswer(f"it ended with exit code {process.returncode}")
            return text[:MAX_CHARS].decode(errors="replace")
        return _NoAnswer(f"no answer within {ASK_S:g} s")
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # It may hang in the driver.
            process.wait(POLL_S)
        assert process.stdout is not None
        process.stdout.close()


def _by_uuid(matrix: Matrix, uuids: dict[int, str]) -> dict[Pair, str]:
    return {
        (uuids[a], uuids[b]): word
        for (a, b), word in matrix.words.items()
        if a in uuids and b in uuids
    }


def _numa_node(pci_id: str | None) -> int | None:
    if pci_id is None:
        return None
    try:
        return parse_numa_node((PCI_DEVICES / pci_id / "numa_node").read_text())
    except OSError:
        return None
