"""A file that was changed is another one, whatever its dates say."""

from __future__ import annotations

import mmap
import os
import time

import pytest

from comfy_xdit_patch.wire.files import file_identity, is_mapped_here


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    time.sleep(0.02)  # the kernel's clock for files ticks a few hundred times a second
    return path


def in_place(path):
    path.write_bytes(b"WEIGHTS")


def in_place_and_dated_back(path):
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def through_a_mapping(path):
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[0] = 87


def by_renaming(path):
    before = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def by_truncating(path):
    os.truncate(path, 3)


def by_removing(path):
    path.unlink()


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_place_and_dated_back,
        through_a_mapping,
        by_renaming,
        by_truncating,
        by_removing,
    ],
)
def test_a_changed_file_is_another_one(file, change):
    before = file_identity(str(file))
    assert before == file_identity(str(file)) != ""
    change(file)
    assert file_identity(str(file)) != before


def test_reading_a_file_does_not_change_it(file):
    before = file_identity(str(file))
    file.read_bytes()
    os.utime(file.parent)
    assert file_identity(str(file)) == before


def test_a_file_is_known_to_be_mapped_while_it_is(file):
    assert not is_mapped_here(str(file))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        assert is_mapped_here(str(file))
    assert not is_mapped_here(str(file))
    assert is_mapped_here(str(file.with_name("none"))), "nobody can tell"
