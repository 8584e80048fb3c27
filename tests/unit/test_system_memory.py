"""Memory that is left is what the tightest limit leaves."""

from __future__ import annotations

import pytest

from comfy_xdit_patch.system_memory import available_bytes

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """``machine("0::/a/b", {"a": (limit, used, files)})``: 16 GiB are free, and groups say so."""

    def make(groups_of_process, limits, names=("memory.max", "memory.current", "inactive_file")):
        proc, root = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {16 << 20} kB\n")
        (proc / "self" / "cgroup").write_text(groups_of_process)
        for group, (limit, used, files) in limits.items():
            directory = root / group
            directory.mkdir(parents=True, exist_ok=True)
            (directory / names[0]).write_text(f"{limit}\n")
            (directory / names[1]).write_text(f"{used}\n")
            (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")
        return root, proc

    return make


def test_without_limits_it_is_what_the_machine_has(machine):
    assert available_bytes(*machine("0::/\n", {})) == 16 * GIB


def test_a_limit_leaves_what_is_not_used_and_what_files_give_back(machine):
    root, proc = machine("0::/a\n", {"a": (8 * GIB, 5 * GIB, GIB)})
    assert available_bytes(root, proc) == 4 * GIB


def test_the_tightest_of_the_groups_around_it_holds(machine):
    limits = {"a/b": ("max", GIB, 0), "a": (4 * GIB, 3 * GIB, 0), ".": (64 * GIB, GIB, 0)}
    assert available_bytes(*machine("0::/a/b\n", limits)) == GIB


def test_in_a_container_the_path_may_be_hidden_and_the_root_is_its_group(machine):
    limits = {".": (2 * GIB, GIB, 0)}
    assert available_bytes(*machine("0::/docker/1234\n", limits)) == GIB


def test_the_first_version_of_groups_has_other_names(machine):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limits = {"memory/a": (3 * GIB, GIB, 0), "memory": (2**63 - 4096, GIB, 0)}
    root, proc = machine("5:cpu:/x\n4:memory:/a\n", limits, names)
    assert available_bytes(root, proc) == 2 * GIB


def test_more_than_the_limit_leaves_nothing(machine):
    assert available_bytes(*machine("0::/a\n", {"a": (GIB, 2 * GIB, 0)})) == 0
