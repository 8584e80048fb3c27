"""The process groups of a rank, in a world of real ranks."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from rig.sockets import internet_sockets

from comfy_xdit_patch.planning.grid import Degrees
from comfy_xdit_patch.worker.ranks.groups import Groups

STEP_TIMEOUT_S = 0.7
DEADLINE_S = 120
RANK = f"""
import json, sys, time
import torch, torch.distributed as dist
from comfy_xdit_patch.worker.ranks import collectives
from comfy_xdit_patch.worker.ranks.groups import Groups
from comfy_xdit_patch.planning.plan import ParallelPlan

rank, world_size, store_fd, mailbox_fd = map(int, sys.argv[1:])
print("imported", flush=True)  # It takes seconds on a busy machine, and no wait here is as long.
sys.stdin.readline()
groups = Groups.join(
    rank=rank, world_size=world_size, device=torch.device("cpu"),
    store_fd=store_fd, mailbox_fd=mailbox_fd, join_timeout_s=60, step_timeout_s={STEP_TIMEOUT_S},
)
if world_size == 2:
    print("joined", flush=True)
    sys.exit()
plans = {{
    "ulysses=2,ring=2": ParallelPlan(ulysses=2, ring=2),
    "batch=2,ulysses=2": ParallelPlan(batch=2, ulysses=2),
    "pipefusion=2,tensor=2": ParallelPlan(pipefusion=2, tensor=2),
    "batch=4": ParallelPlan(batch=4),
}}
names = ("sequence", "ulysses", "ring", "pipeline", "tensor")
found = {{"ranks": {{}}, "waits_s": {{}}}}
everyone = groups.everyone
found["is_world"] = everyone is dist.group.WORLD
found["is_apart"] = groups.weights is not everyone
found["has_mailboxes"] = collectives.mailboxes is not None
used = {{"weights": groups.weights}}
for plan, grid in plans.items():
    made = groups.of_plan(grid)
    found["again"] = groups.of_plan(grid) is made
    for name in names:
        group = getattr(made, name)
        found["ranks"][f"{{plan}}: {{name}}"] = group and dist.get_process_group_ranks(group)
        if group is not None:
            used[f"{{plan}}: {{name}}"] = group
found["num_groups"] = len(dist.distributed_c10d._world.pg_map)
found["modules"] = sorted({{"xfuser", "diffusers", "transformers"}} & set(sys.modules))
dist.barrier()
if rank == 0:  # Nobody sends what this rank waits for.
    for name, group in {{g: (n, g) for n, g in used.items()}}.values():
        begin = time.monotonic()
        try:
            dist.recv(torch.zeros(1), group=group, group_src=1)
        except RuntimeError:
            found["waits_s"][name] = time.monotonic() - begin
    dist.distributed_c10d._get_default_store().set("waited", "")
dist.distributed_c10d._get_default_store().wait(["waited"])
print(json.dumps(found), flush=True)
"""


@contextlib.contextmanager
def ranks_of(world_size):
    """Ranks that have imported all and wait for a line, and the store that they will share."""
    store_fd, mailbox_fd = (os.memfd_create(name) for name in ("store", "mailboxes"))
    command = [sys.executable, "-c", RANK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(store_fd), str(mailbox_fd)],
            pass_fds=[store_fd, mailbox_fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world_size)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["imported\n"] * world_size
        yield ranks, store_fd
    finally:
        os.close(store_fd)
        os.close(mailbox_fd)
        for rank in ranks:
            rank.kill()
            rank.wait()


def begin(rank):
    rank.stdin.write("\n")
    rank.stdin.flush()


@pytest.fixture(scope="module")
def world():
    """What each of four ranks found."""
    with ranks_of(4) as (ranks, _):
        for rank in ranks:
            begin(rank)
        return [json.loads(rank.communicate(timeout=DEADLINE_S)[0]) for rank in ranks]


def test_no_rank_listens_before_all_are_there():
    with ranks_of(2) as (ranks, store_fd):
        early, late = ranks
        begin(early)
        end = time.monotonic() + DEADLINE_S
        while not os.fstat(store_fd).st_size:
            assert time.monotonic() < end, "it has not come to the store"
            time.sleep(0.01)
        time.sleep(0.3)  # what it does next, it has done
        assert early.poll() is None
        assert [s for s in internet_sockets(early.pid) if s.is_listening] == []
        begin(late)
        assert [rank.stdout.readline() for rank in ranks] == ["joined\n"] * 2


def test_to_ask_for_the_group_of_all_ranks_does_nothing():
    groups = Groups(
        rank=0,
        world_size=2,
        device=torch.device("cpu"),
        step_timeout=datetime.timedelta(seconds=1),
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert groups.everyone is None, "this process has joined nobody"
        socket.create_connection(server.getsockname(), timeout=1).close()


def test_every_rank_is_in_the_groups_of_its_plan(world):
    rank_0, rank_3 = world[0]["ranks"], world[3]["ranks"]
    assert rank_0["ulysses=2,ring=2: sequence"] == [0, 1, 2, 3]
    assert rank_0["ulysses=2,ring=2: ulysses"] == rank_0["batch=2,ulysses=2: sequence"] == [0, 1]
    assert rank_0["ulysses=2,ring=2: ring"] == rank_0["pipefusion=2,tensor=2: pipeline"] == [0, 2]
    assert rank_3["ulysses=2,ring=2: ring"] == rank_3["pipefusion=2,tensor=2: pipeline"] == [1, 3]
    assert rank_3["pipefusion=2,tensor=2: tensor"] == [2, 3]


def test_an_axis_of_one_rank_has_no_group(world):
    for found in world:
        for name in ("sequence", "ulysses", "ring", "pipeline", "tensor"):
            assert found["ranks"][f"batch=4: {name}"] is None
        assert found["ranks"]["batch=2,ulysses=2: ring"] is None


def test_the_group_of_all_ranks_is_the_world_and_that_of_the_weights_is_apart(world):
    assert all(found["is_world"] and found["is_apart"] for found in world)


@pytest.mark.parametrize(
    ("plan", "degrees"),
    [
        ("ulysses=2,ring=2", (1, 1, 2, 2, 1)),
        ("batch=2,ulysses=2", (2, 1, 1, 2, 1)),
        ("pipefusion=2,tensor=2", (1, 2, 1, 1, 2)),
        ("batch=4", (4, 1, 1, 1, 1)),
    ],
)
def test_memory_is_planned_for_as_many_communicators_as_a_rank_has(world, plan, degrees):
    neighbours = degrees[1] - 1  # of two stages
    for found in world:
        shared = {name: ranks for name, ranks in found["ranks"].items() if plan in name and ranks}
        groups = {tuple(ranks) for name, ranks in shared.items() if "pipeline" not in name}
        assert Degrees(*degrees).num_communicators == len(groups | {(0, 1, 2, 3)}) + neighbours


@pytest.mark.parametrize(
    ("degrees", "number"),
    [((1, 1, 1, 8, 1), 1), ((1, 1, 2, 4, 1), 3), ((1, 1, 1, 2, 4), 3), ((2, 4, 1, 1, 1), 3)],
)
def test_every_axis_but_that_of_all_ranks_has_a_communicator(degrees, number):
    assert Degrees(*degrees).num_communicators == number


def test_a_group_is_made_once_and_none_beside_it(world):
    # The world, the weights' group, and of each rank one pair of neighbours and one at a distance.
    assert [found["num_groups"] for found in world] == [4] * 4
    assert all(found["again"] for found in world)


def test_no_wait_in_any_group_is_longer_than_the_timeout(world):
    waits = world[0]["waits_s"]
    assert len(waits) == 4
    for name, seconds in waits.items():
        assert STEP_TIMEOUT_S * 0.9 < seconds < STEP_TIMEOUT_S + 2, name


def test_cpu_ranks_exchange_through_memory_that_they_share(world):
    assert all(found["has_mailboxes"] for found in world)


def test_groups_need_no_other_package_than_torch(world):
    assert [found["modules"] for found in world] == [[]] * 4
