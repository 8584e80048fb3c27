"""Workers that cannot exchange data at first are started again without peer-to-peer, once.

Real CPU workers, which have no peer-to-peer: the fault is planted where NCCL's would be, and what
is tested is everything around it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inside.client import Inside
from rig.faults import Fault, Orders, is_running
from rig.server import SHIM
from rig.status_schema import counted
from rig.trees import Tree

from comfy_xdit_patch.hardware.devices import Device
from comfy_xdit_patch.host.pool import start as starting
from comfy_xdit_patch.host.pool.inheritance import HostState
from comfy_xdit_patch.host.pool.pool import Pool, PoolState
from comfy_xdit_patch.settings import read_settings

pytestmark = [pytest.mark.newest_only, pytest.mark.group("2")]

DEADLINE_S = 180.0
HANG_S = 2.0


@pytest.fixture
def own_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Orders:
    """Faults of the workers that this process starts."""
    path = tmp_path / "orders"
    path.mkdir()
    monkeypatch.setenv("RIG_FAULTS", str(path))
    monkeypatch.setenv("PYTHONPATH", str(SHIM))
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    return Orders(path)


@pytest.fixture
def pool(tree: Tree, close_inside: Callable[[], None], own_orders: Orders) -> Iterator[Pool]:
    """Two CPU workers that this process, which is no ComfyUI, has started when they are asked."""
    close_inside()
    host_state = HostState(
        comfyui_root=str(tree.path),
        sys_path=[str(tree.path), *sys.path],
        argv=["main.py", "--cpu"],
        parses_arguments=True,
        arguments={},
    )
    settings = read_settings({"XDIT_GPUS": "cpu:2", "XDIT_START_TIMEOUT": str(DEADLINE_S)})
    made = Pool(
        devices=[Device("cpu")] * 2,
        host_state=host_state,
        settings=settings,
        unless_busy=lambda action: action(),
    )
    yield made
    made.stop()


def have_told(orders: Orders, pool: Pool) -> dict[int, str]:
    """End the workers, and return what those that replace them have in their environments.

    What /proc has of a forked process is its parent's.
    """
    crew = pool.crew
    assert crew is not None
    for rank in range(2):
        (orders.path / f"joined.{rank}").write_text("tell variables")
    crew.workers[0].process.kill()
    end = time.monotonic() + DEADLINE_S
    while pool.crew in (None, crew):
        assert time.monotonic() < end
        time.sleep(0.05)
    return {rank: (orders.path / f"variables.{rank}").read_text() for rank in range(2)}


def give_in_turn(orders: Orders, *faults: Fault) -> threading.Thread:
    """Order each fault when the one before it has happened."""

    def give() -> None:
        for fault in faults:
            end = time.monotonic() + DEADLINE_S
            while orders.open() and time.monotonic() < end:
                time.sleep(0.02)
            orders.give(fault)

    thread = threading.Thread(target=give)
    thread.start()
    return thread


def test_a_hang_in_the_first_exchange_is_ended_and_the_next_start_does_without_peer_to_peer(
    pool: Pool,
    own_orders: Orders,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(starting, "FIRST_EXCHANGE_S", HANG_S)
    caplog.set_level(logging.INFO)
    own_orders.give(Fault("exchange", "hang", 1))
    pool.wait_until_ready(lambda: None)
    assert not own_orders.open(), "the fault never happened"
    assert pool.state is PoolState.READY
    reason = pool.no_peer_to_peer or ""
    assert f"did not exchange data within {HANG_S:.0f} s" in reason
    assert "first_exchange.py" in reason, "where the ranks are is not said"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "started again without peer-to-peer (NCCL_P2P_DISABLE=1)" in warning
    assert reason in warning
    assert [r for r in caplog.records if r.levelno > logging.WARNING] == []
    record_property("seconds of both starts", pool.start_seconds)
    # Workers that are lost later are not tried with it again.
    for variables in have_told(own_orders, pool).values():
        assert "NCCL_P2P_DISABLE=1\n" in variables
    assert pool.no_peer_to_peer == reason


def test_comfyui_goes_on_alone_where_no_start_succeeds(
    tree: Tree,
    inside: Callable[..., Inside],
    flux_dev: Callable[..., str],
    orders: Orders,
    tmp_path: Path,
) -> None:
    ranks: Inside = inside(tree, XDIT_GPUS="cpu:2", XDIT_STEP_TIMEOUT="599")
    faults = Fault("exchange", "other data", 1), Fault("exchange", "segv", 1)
    thread = give_in_turn(orders, *faults)
    case: dict[str, Any] = {"height": 16, "width": 12, "batch": 1, "text_tokens": 24}
    status = ranks.call("forwards:forward", path=flux_dev(hidden=256), out=f"{tmp_path}/x", **case)
    thread.join(DEADLINE_S)
    assert not orders.open(), "a fault never happened"
    assert counted(status["fell_back"]) == {"the workers did not start": 1}
    reason = status["reason"]
    assert "was killed by signal 11 in the first exchange between ranks" in reason
    assert "That was without peer-to-peer, because of this before: Rank 1 (cpu) failed in" in reason
    assert "of 256 numbers from rank 1 arrived as others than were sent" in reason
    assert status["peer_to_peer_disabled"] is None
    assert not [rank for rank in status["ranks"] if rank["pid"] and is_running(rank["pid"])]
