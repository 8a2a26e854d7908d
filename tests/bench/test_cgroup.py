"""A bound that counts the page cache holds, and no control group outlives its user."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distlab.training import cgroup
from distlab.training.cgroup import Group, bounded_memory

MB = 2**20
USER = """
import mmap, sys, time
from distlab.training.cgroup import bounded_memory
file = open(sys.argv[1], "w+b")
file.truncate(96 << 20)
with bounded_memory(32 << 20) as group:
    mapped = mmap.mmap(file.fileno(), 0)
    for begin in range(0, len(mapped), 1 << 20):
        mapped[begin : begin + (1 << 20)] = bytes([begin >> 20]) * (1 << 20)
    kept = all(mapped[place << 20] == place for place in range(96))
    print(group.folder, group.used(), kept, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def a_group():
    with bounded_memory(64 * MB) as group:
        if group is None:
            pytest.skip("this process may make no control group")


def start(tmp_path, rest_s):
    command = [sys.executable, "-c", USER, str(tmp_path / "data"), str(rest_s)]
    user = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    folder, used, kept = user.stdout.readline().split()
    return user, Path(folder), int(used), kept == "True"


def test_pages_of_files_are_bounded(a_group, tmp_path):
    user, folder, used, kept = start(tmp_path, 0)
    user.communicate(timeout=60)
    assert user.returncode == 0
    assert kept, "what was forgotten was not read again from the disk"
    assert used <= 32 * MB < (tmp_path / "data").stat().st_size
    assert not folder.exists()


def test_a_killed_user_leaves_no_group(a_group, tmp_path):
    user, folder, _, _ = start(tmp_path, 60)
    assert folder.exists()
    user.send_signal(signal.SIGKILL)
    user.communicate(timeout=60)
    until = time.monotonic() + 30
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not folder.exists()


def test_a_group_without_owner_is_removed_by_the_next(a_group):
    with bounded_memory(64 * MB) as group:
        orphan = group.folder.with_name(f"{cgroup.PREFIX}99999999")
        orphan.mkdir()
    with bounded_memory(64 * MB):
        assert not orphan.exists()


def test_without_the_right_there_is_no_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroup, "_hierarchy", lambda: (tmp_path / "a", tmp_path / "a", 2))
    with bounded_memory(64 * MB) as group:
        assert group is None
    assert os.listdir(tmp_path) == []


def test_a_limit_beyond_the_kernel_s_numbers_is_no_small_one(tmp_path):
    group = Group(tmp_path, 2)
    group.swap.write_text("max")
    group.bound(10**300)
    assert int(group.limit.read_text()) == 2**50
