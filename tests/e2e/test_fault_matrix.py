"""Every fault at every point of every rank: the image is stock's, and the next is parallel again.

The faults are real, in real processes: signals, exceptions, shut connections, torn messages. The
default run takes one of each mechanism; ``FAULTS_ALL=1`` takes the whole matrix on 2 ranks, and
``FAULTS_RANKS=3`` takes it on 3. ``FAULTS_CASES`` is a pattern that picks cases by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
from rig.environment import RigError
from rig.fault_bench import Bench
from rig.faults import (
    AT_START,
    SOME_FAULTS,
    Fault,
    Orders,
    all_faults,
    children,
    is_running,
    num_fds,
)

pytestmark = [pytest.mark.group("faults"), pytest.mark.usefixtures("newest_only")]

Record = Callable[[str, object], None]


def chosen() -> list[Fault]:
    ranks = os.environ.get("FAULTS_RANKS", "2")
    everything = "FAULTS_ALL" in os.environ or "FAULTS_RANKS" in os.environ
    faults = all_faults(int(ranks)) if everything else list(SOME_FAULTS)
    return [fault for fault in faults if re.search(os.environ.get("FAULTS_CASES", ""), fault.name)]


@pytest.mark.slow  # workers start anew after most of them
def test_every_fault_costs_time_and_nothing_else(
    bench: Bench, orders: Orders, record_property: Record
) -> None:
    bench.heal()
    shared, fds = set(os.listdir("/dev/shm")), num_fds(bench.host_pid)
    failures = []
    for fault in chosen():
        before = bench.pids
        try:
            bench.cause(fault)
            run, seconds = bench.run()
            assert not orders.open(), "the fault never happened"
            fell_back = run["steps"] - run["steps_parallel"]
            assert set(run["fall_back_reasons"]) <= set(fault.reasons), run
            if fault.point not in (*AT_START, "store", "idle"):  # There it may be over by then.
                assert bool(fell_back) == bool(fault.reasons), run
            bench.heal()
            left = [pid for pid in before - bench.pids if is_running(pid)]
            assert not left, "half a world is left"
            assert children(bench.host_pid) == bench.pids, "processes are left"
            assert set(os.listdir("/dev/shm")) <= shared
            # Those of shared memory that one prompt more has taken, not one for every fault.
            assert num_fds(bench.host_pid) <= fds + 4
            record_property(fault.name, f"{seconds:.1f} s, {fell_back} of {run['steps']} fell back")
        except (AssertionError, RigError, OSError) as error:
            failures.append(f"{fault.name}: {type(error).__name__}: {error}")
            orders.withdraw()
            bench.heal()
    assert not failures, f"{len(failures)} of {len(chosen())} failed:\n" + "\n".join(failures)
