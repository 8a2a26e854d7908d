"""What ranks tell each other: values by rank, whether weights are equal, whose time counts."""

import subprocess
import sys
import time

import psutil
import torch

from distlab import ranks
from distlab.measure import Timing
from distlab.spawning import spawn


def in_a_job(job):
    mine = torch.full((2, 2), 1.0)
    mine[1, 1] += job.rank * 2.0**-20  # one bit of difference in one number
    return {
        "gathered": ranks.gathered({"rank": job.rank}),
        "equal": ranks.distinct([torch.ones(3), torch.tensor(2, dtype=torch.bfloat16)]),
        "different": ranks.distinct([mine]),
        "slowest": ranks.slowest(Timing((1.0 + job.rank, 5.0 - job.rank, 2.0))).samples,
    }


def test_what_ranks_tell_each_other():
    results = spawn(in_a_job, 3)
    for found in results:
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert (found["equal"], found["different"]) == (1, 3)
        assert found["slowest"] == (3.0, 5.0, 2.0)


def test_a_digest_tells_views_order_and_types_apart_but_not_devices_layout():
    one = torch.arange(6.0).reshape(2, 3)
    assert ranks.digest([one]) == ranks.digest([one.T.contiguous().T])  # the same numbers
    assert ranks.digest([one]) != ranks.digest([one.T])
    assert ranks.digest([one]) != ranks.digest([one.double()])
    assert ranks.digest([torch.tensor(1.0)]) == ranks.digest([torch.tensor([1.0])])


RESTING = """
import os, time
from pathlib import Path
from distlab.spawning import spawn

def rest(job):
    Path(f"pid{job.rank}.part").write_text(str(os.getpid()))
    Path(f"pid{job.rank}.part").rename(f"pid{job.rank}")
    time.sleep(200)

if __name__ == "__main__":
    spawn(rest, 2, timeout_s=200)
"""


def test_ranks_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "resting.py").write_text(RESTING)
    parent = subprocess.Popen([sys.executable, "resting.py"], cwd=tmp_path)
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    try:
        wait_until(lambda: all(file.exists() for file in files))
        ranks = [int(file.read_text()) for file in files]
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in ranks))


def wait_until(holds):
    end = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)
